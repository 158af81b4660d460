"""Parquet files of yuekai/InstructS2S-200K and of SLAM-Omni's data sets.

A row is one question and its reply: `round`, `question`, `question_audio`, `answer` and
`answer_audio` or `speech_token`. The recordings are inside, as {"bytes", "path"}. `rounds` says how
rows become dialogues. At most one row group is in memory: 100 rows in Hugging Face's files.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from omni2_jax.files import first_line
from omni2_jax.train.data.sources import rounds
from omni2_jax.train.data.sources.base import Format

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


def files(path: Path) -> list[Path]:
    """The parquet files of a source, in order: itself, or those in the folder or in its data/."""
    if not path.is_dir():
        return [path]
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def items(source: Path) -> Iterator[tuple[object, float]]:
    """The dialogues of parquet files. Raises ValueError naming the file that cannot be read."""
    return rounds.grouped(rows(source))


def rows(source: Path) -> Iterator[tuple[object, float]]:
    """Every row as a dictionary of `rounds.COLUMNS`, with the share of all rows read so far."""
    opened = [(path, open_file(path)) for path in files(source)]
    total = max(1, sum(file.metadata.num_rows for _, file in opened))
    count = 0
    for path, file in opened:
        columns = [name for name in file.schema_arrow.names if name in rounds.COLUMNS]
        try:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                for index in range(table.num_rows):
                    count += 1
                    yield table.slice(index, 1).to_pylist()[0], count / total
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from None


def open_file(path: Path) -> "ParquetFile":
    """An open parquet file. Raises ValueError if it is none, or has no questions and replies."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        message = f"{path} is no parquet file that can be read: {first_line(error)}"
        raise ValueError(message) from None
    names = set(file.schema_arrow.names)
    for keys in (rounds.QUESTION, rounds.REPLY):
        if not names & set(keys):
            raise ValueError(
                f"{path} has no column {keys[-1]!r}; its columns are {', '.join(sorted(names))}"
            )
    return file


FORMAT = Format(items, rounds.parse)

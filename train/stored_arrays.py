"""What a frozen part computes of a data set, kept on disk: one record for each dialogue.

DIR/data/NAME.json                                     what the arrays were made from, and the
                                                       record of each dialogue
DIR/data/RECORDS-00000-of-00003.array_record           [n, width] each; DIR/validation/ likewise
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from omni2_jax import remote
from omni2_jax.console import progress_bar, say
from omni2_jax.files import first_line
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.loader import EMPTY_ROW
from omni2_jax.train.data.writer import SHARD_BYTES, Shards
from omni2_jax.train.examples import Item, Row
from omni2_jax.train.split import Split

# The arrays of a batch on the devices -> [B, ...], on the host; and of a row what is kept: the
# values, the row's arrays in the batch, and its item -> [n, width].
Compute = Callable[[dict[str, jax.Array]], np.ndarray]
Select = Callable[[np.ndarray, Row, Item], np.ndarray]


class StoredArrays:
    """The arrays [n, width] of a data set's dialogues.

    origin: what they were made from beside the data; each value is compared with the file's.
    Raises ValueError if the files are missing or damaged, or were made from something else.
    """

    name: ClassVar[str]  # of the file NAME.json
    records: ClassVar[str]  # of the files with the records
    content: ClassVar[str]  # in messages
    command: ClassVar[str]  # that computes them
    other: ClassVar[str]  # what may differ, with names from `origin` in braces

    def __init__(self, path: Path, data: Dataset, width: int, **origin: object):
        self.path, self.width = path, width
        try:
            metadata = json.loads((path / f"{self.name}.json").read_text())
            self.dtype, self.places = jnp.dtype(metadata["dtype"]), metadata["places"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            message = f"{path} holds no {self.content}; {self.command} computes them"
            raise ValueError(message) from None
        expected = {"data": identity(data), "width": width, **origin}
        if any(metadata.get(key) != value for key, value in expected.items()):
            other = self.other.format(width=width, **origin)
            raise ValueError(f"{path} was made from other data than {data.path}, {other}")
        files = remote.local_copy(path).glob(f"{self.records}-*-of-*.array_record")
        try:
            self.source = ArrayRecordDataSource(sorted(map(str, files)))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}") from None
        # NAME.json has no checksum; a wrong place would give a dialogue another one's arrays.
        used = [place for place in self.places if place is not None]
        if set(used) != set(range(len(self.source))) or len(used) != len(self.source):
            raise ValueError(
                f"{path} is damaged: its {self.name}.json does not name each record once"
            )

    def read(self, dialogue: int, count: int) -> np.ndarray:
        """The array [count, width] of a dialogue.

        Raises RecordError if it is damaged, or if there is none because the dialogue was left out.
        """
        try:
            place = self.places[dialogue]
            record = None if place is None else self.source[place]
            if record is not None:
                return np.frombuffer(record, self.dtype).reshape(count, self.width)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise RecordError(
                f"{self.path}: the {self.content} of dialogue {dialogue} are damaged: "
                f"{first_line(error)}"
            ) from None
        raise RecordError(
            f"{self.path} has no {self.content} of dialogue {dialogue}: {self.command} left it out"
        )

    @classmethod
    def write(
        cls, folder: Path, split: Split, metadata: Mapping[str, object], rows: Iterator
    ) -> None:
        """Write the arrays of one data set, and NAME.json, which says how to recognise them.

        rows: the dialogue and the array of every example, from `arrays`. metadata: `width`, `dtype`
        and the origin.
        """
        folder.mkdir()
        data = split.examples.data
        shards = Shards(folder, cls.records, SHARD_BYTES)
        places: list[int | None] = [None] * len(data)
        for dialogue, array in rows:
            places[dialogue] = shards.add(array.tobytes())
        shards.close()
        content = {"data": identity(data), **metadata, "places": places}
        (folder / f"{cls.name}.json").write_text(json.dumps(content) + "\n")

    @classmethod
    def arrays(
        cls, split: Split, compute: Compute, select: Select
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Dialogue and array of every example, in the order of the batches.

        Examples whose record is damaged are left out, and each is printed.
        """
        source = split.loader.source
        with progress_bar() as bar:
            path = split.examples.data.path
            task = bar.add_task(f"{cls.content} of {path}", total=len(split.batches))
            for batch, (placed, raw) in zip(split.batches, split.loader.start(0), strict=True):
                values = compute(placed)
                for row, number in enumerate(batch.rows):
                    if number == EMPTY_ROW:
                        continue
                    item = split.catalogue.items[number]
                    if item.dialogue in source.damaged:
                        continue
                    arrays = {name: value[0, row] for name, value in raw.items()}
                    yield item.dialogue, select(values[row], arrays, item)
                for reason in source.new_damage():
                    say(f"{reason}; left out")
                bar.advance(task)


def identity(data: Dataset) -> dict:
    """What a data set's own description says, to recognise it."""
    return dataclasses.asdict(data.info)

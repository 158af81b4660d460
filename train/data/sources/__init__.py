"""Sources of dialogues: files in several formats, read one dialogue at a time.

questions    a JSON array, the released example format                    conversations.py
jsonl        a .jsonl file, or a folder with data.jsonl                   conversations.py
recordings   a .jsonl file of recordings with their text, or a folder     conversations.py
             with metadata.jsonl
instructs2s  instruct_en_200k_data_cosy2.json of ICTNLP/InstructS2S-200K  conversations.py
vocalnet     VocalNet's JSON array, with units in .npy files              vocalnet.py
slam         SLAM-Omni's .jsonl, a question and its reply a line          slam.py
parquet      parquet files with recordings inside, or a folder of them:   parquet.py
             yuekai/InstructS2S-200K and SLAM-Omni's sets

A line or an element may state its "split", as "train" or "test", of which a reader can ask for one.
Units are a list of numbers, or a text: "<12><6560>" or "12 6560". What a turn lacks may be left out
or be null; of recordings and units it may also be empty.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from omni2_jax.audio.recordings import check_regular
from omni2_jax.train.data.sources import conversations, parquet, slam, vocalnet
from omni2_jax.train.data.sources.base import (
    Entry,
    Format,
    Sound,
    SourceDialogue,
    SourceError,
    entries,
)
from omni2_jax.train.data.sources.json_files import json_array, json_lines

__all__ = ["FORMATS", "Entry", "Format", "Sound", "SourceDialogue", "SourceError", "read"]

FORMATS = {
    "questions": conversations.QUESTIONS,
    "jsonl": conversations.JSONL,
    "recordings": conversations.RECORDINGS,
    "instructs2s": conversations.INSTRUCTS2S,
    "vocalnet": vocalnet.FORMAT,
    "slam": slam.FORMAT,
    "parquet": parquet.FORMAT,
}


def read(path: Path, kind: str | None = None, split: str | None = None) -> Iterator[Entry]:
    """The dialogues of a source. kind: a key of FORMATS; None is inferred from the file.

    split: only those that state this split; None is all of them.

    Raises ValueError, one line naming the file, if it cannot be read in this format: partly when
    the iterator arrives at the fault. A dialogue that cannot be used raises when its entry is read.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"format {kind!r}; expected one of {', '.join(FORMATS)}")
    file = main_file(path)
    if not file.is_dir():
        check_regular(file)
    return entries(file, FORMATS[kind or infer(file)], split)


def size(path: Path) -> int:
    """The bytes of a source's files of dialogues. Raises ValueError if there are none."""
    return sum(file.stat().st_size for file in parquet.files(main_file(path)))


def main_file(path: Path) -> Path:
    """The file of a source that holds its dialogues, or the folder of its parquet files."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return inner_file(path) if path.is_dir() else path


def inner_file(folder: Path) -> Path:
    """The file that holds a folder's dialogues; the folder itself if these are parquet files."""
    for name in ("data.jsonl", "metadata.jsonl"):
        if (folder / name).exists():
            return folder / name
    if parquet.files(folder):
        return folder
    raise ValueError(f"{folder} has no data.jsonl, no metadata.jsonl and no .parquet files")


def infer(file: Path) -> str:
    """The format of a file or folder, by its suffix and by the keys of its first dialogue."""
    if file.is_dir() or file.suffix == ".parquet":
        return "parquet"
    is_lines = file.suffix == ".jsonl"
    first, _ = next(json_lines(file) if is_lines else json_array(file), (None, 0))
    keys = set(first) if isinstance(first, Mapping) else set()
    if is_lines and keys & {"source_wav", "target_text"}:
        return "slam"
    if is_lines:
        return "recordings" if "audio" in keys else "jsonl"
    if "conversations" in keys:
        return "vocalnet"
    turns = first.get("conversation") if isinstance(first, Mapping) else None
    has_unit = isinstance(turns, list) and any(
        isinstance(turn, Mapping) and "unit" in turn for turn in turns
    )
    return "instructs2s" if has_unit else "questions"

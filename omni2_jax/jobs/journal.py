"""The journal of a job: a line of JSON for each item that is finished.

The first line is the header; the lines behind it are in the order in which the items were finished.
In Cloud Storage, where files cannot be appended to, a journal is a folder of files.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from omni2_jax import files, remote
from omni2_jax.jobs.where import Shard

NAME = re.compile(r"journal-(\d+)-of-(\d+)\.jsonl")
DOWNLOADS = 32  # files of a journal that are fetched from Cloud Storage at the same time


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    number: the item's place among all items, from 0. digest: tells whether its payload is still the
    same. value: what the function returned; files: the names of its files in the job's directory.
    A refused item has a `reason` in a few words, for counting, and a `message` in place of these.
    """

    number: int
    key: str
    digest: str
    value: Any = None
    files: tuple[str, ...] = ()
    reason: str | None = None
    message: str = ""


class Place(NamedTuple):
    """Where the line of an outcome begins, and what must be known without reading it again."""

    offset: int
    key: str
    digest: str
    reason: str | None


def shards_in(directory: Path) -> list[Shard]:
    """The shards of which a directory holds journals, in order."""
    if not directory.is_dir():
        return []
    matches = [NAME.fullmatch(path.name) for path in directory.iterdir()]
    return sorted(Shard(int(match[1]), int(match[2])) for match in matches if match)


class Journal(contextlib.AbstractContextManager):
    """The outcomes of one shard. They can be added to in `with journal:`, and read ever after.

    header: the name and the settings of the job, JSON-able. places: where each outcome is, by the
    number of its item. A journal to which nothing was added is removed at the end, with the
    directories that were made for it.

    `with` raises ValueError, one line, if the journal was begun with another header, is damaged, is
    in use by another process, or cannot be written.
    """

    def __init__(self, directory: Path, shard: Shard, header: Mapping[str, Any]):
        self.directory, self.shard = directory, shard
        self.header = json.loads(json.dumps(header))  # tuples become lists, as in the file
        self.path = self.local = directory / f"journal-{shard.index}-of-{shard.count}.jsonl"
        self.places: dict[int, Place] = {}
        self.parts = 0  # files of a journal in Cloud Storage
        self.new_directories: list[Path] = []
        self.checked = False  # that it is a journal of this job
        if remote.is_remote(directory):
            self.temporary = tempfile.TemporaryDirectory(prefix="omni2-job-")
            self.local = Path(self.temporary.name) / self.path.name

    def __enter__(self) -> "Journal":
        with contextlib.ExitStack() as stack:
            if self.local == self.path:
                self.make_directory()
            else:
                self.download()
            stack.callback(self.remove_if_empty)
            in_use = f"{self.path}: another process is working on it"
            self.file = stack.enter_context(files.open_locked(self.local, in_use))
            self.read()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Add outcomes. When this returns they are on disk. Raises ValueError if it refuses."""
        lines, offset = b"", self.file.seek(0, os.SEEK_END)
        places = {}
        for outcome in outcomes:
            start = offset + len(lines)
            places[outcome.number] = Place(start, outcome.key, outcome.digest, outcome.reason)
            lines += line(vars(outcome))
        self.append(lines)
        self.places |= places

    # ---- the file ----

    def append(self, lines: bytes) -> None:
        """Write whole lines at the end."""
        try:
            self.file.write(lines)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
        if self.local != self.path:
            with files.atomic_write(self.path / f"{self.parts:08d}.jsonl", "wb") as file:
                file.write(lines)
            self.parts += 1

    def make_directory(self) -> None:
        """Make the directory, and remember which of its parents were not there."""
        folders = (self.directory, *self.directory.parents)
        self.new_directories = [folder for folder in folders if not folder.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {self.directory}: {error.strerror}") from None

    def remove_if_empty(self) -> None:
        """Remove a journal without outcomes, and the directories that were made for it."""
        if self.places or not self.checked:
            return
        remote.remove(self.path) if self.local != self.path else self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            for folder in self.new_directories:
                folder.rmdir()

    def download(self) -> None:
        """Copy the files of a journal in Cloud Storage into one on this machine."""
        paths = sorted(self.path.iterdir()) if self.path.is_dir() else []
        self.parts = len(paths)
        with open(self.local, "wb") as file, ThreadPoolExecutor(DOWNLOADS) as pool:
            file.writelines(pool.map(Path.read_bytes, paths))

    def read(self) -> None:
        """Check the header and find the outcomes; write the header of a new journal.

        A last line that was cut off is dropped: the process was killed when it wrote it.
        """
        self.file.seek(0)
        offset = 0
        for number, text in enumerate(self.file):
            if not text.endswith(b"\n"):
                break
            try:
                content = json.loads(text)
                if number:
                    place = Place(offset, content["key"], content["digest"], content["reason"])
                    self.places[content["number"]] = place
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} is damaged: line {number + 1}") from None
            if not number:
                self.check_header(content)
            offset += len(text)
        self.file.truncate(offset)
        if not offset:
            self.append(line(self.header))
        self.checked = True

    def check_header(self, header: Any) -> None:
        """Raise ValueError, which names a setting that differs, unless the headers are equal."""
        if not isinstance(header, dict):
            raise ValueError(f"{self.path} is no journal of a job")
        for name in header | self.header:
            old, new = header.get(name), self.header.get(name)
            if old != new:
                raise ValueError(
                    f"{self.path} was begun with {name} {old!r}, not {new!r}; go on with the same "
                    "settings, or give a new directory"
                )


def read_outcome(file: IO[bytes], place: Place) -> Outcome:
    """The outcome at a place of a journal's file."""
    file.seek(place.offset)
    fields = json.loads(file.readline())
    return Outcome(**fields | {"files": tuple(fields["files"])})


def line(content: Mapping[str, Any]) -> bytes:
    """An object of JSON as a line."""
    return (json.dumps(content) + "\n").encode()

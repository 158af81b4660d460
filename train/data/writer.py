"""Makes a data set: records in shards, and dataset.json. See `dataset` for the files."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from array_record.python.array_record_module import ArrayRecordWriter

from omni2_jax import files, remote
from omni2_jax.train.data.dataset import Info
from omni2_jax.train.data.records import Dialogue, check, pack

SHARD_BYTES = 512 * 2**20
OPTIONS = "group_size:1,uncompressed"  # a record is read alone; FLAC and units compress no further


class Shards:
    """Writes records into the files NAME-00000, NAME-00001, ... of about `limit` bytes each.

    `close` adds the number of files to their names: NAME-00000-of-00002.array_record.
    """

    def __init__(self, directory: Path, name: str, limit: int):
        self.directory, self.name, self.limit = directory, name, limit
        self.paths: list[Path] = []
        self.writer: ArrayRecordWriter | None = None
        self.size = 0  # bytes in the open file
        self.count = 0  # records in all

    def add(self, record: bytes) -> int:
        """Write a record and return its index. Raises RuntimeError if the file system refuses."""
        writer = self.writer
        if writer is None or self.size + len(record) > self.limit:
            self.finish_shard()
            self.paths.append(self.directory / f"{self.name}-{len(self.paths):05d}")
            writer = self.writer = ArrayRecordWriter(str(self.paths[-1]), OPTIONS)
            self.size = 0
        writer.write(record)
        self.size += len(record)
        self.count += 1
        return self.count - 1

    def finish_shard(self) -> None:
        """Close the open file, if there is one. Raises RuntimeError if it cannot be completed."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()

    def close(self) -> None:
        """Close and rename all files. Raises RuntimeError if the last cannot be completed."""
        self.finish_shard()
        for path in self.paths:
            path.rename(f"{path}-of-{len(self.paths):05d}.array_record")


class Writer(contextlib.AbstractContextManager):
    """Makes a data set: `with Writer(path) as writer: writer.add(...)`.

    `path` appears when the block ends without an error, and not at all otherwise. shard_bytes: the
    approximate size of a file. tokenizer, fingerprint: for dataset.json, see `Info`.

    Raises ValueError if `path` exists, cannot be written to, or would be empty.
    """

    def __init__(
        self,
        path: Path,
        shard_bytes: int = SHARD_BYTES,
        tokenizer: str | None = None,
        fingerprint: str | None = None,
    ):
        self.path, self.shard_bytes = remote.as_path(path), shard_bytes
        self.info = Info(tokenizer=tokenizer, fingerprint=fingerprint)

    def __enter__(self) -> "Writer":
        with contextlib.ExitStack() as stack:
            self.directory = stack.enter_context(files.atomic_directory(self.path))
            stack.push(self.finish)
            self.dialogues = Shards(self.directory, "dialogues", self.shard_bytes)
            self.clips = Shards(self.directory, "clips", self.shard_bytes)
            self.stack = stack.pop_all()
        return self

    def add(self, dialogue: Dialogue, clips: Sequence[bytes | None] = ()) -> None:
        """Write a dialogue and the recordings of its turns.

        clips: one from `encode_clip` for each turn, or None; empty if no turn has one. A turn with
        a recording states its `samples`. Raises ValueError if the dialogue breaks a rule, OSError
        if the file system refuses.
        """
        check(dialogue)
        clips = clips or [None] * len(dialogue.turns)
        try:
            indices = [None if clip is None else self.clips.add(clip) for clip in clips]
            turns = tuple(
                dataclasses.replace(turn, clip=index)
                for turn, index in zip(dialogue.turns, indices, strict=True)
            )
            dialogue = dataclasses.replace(dialogue, turns=turns)
            self.dialogues.add(pack(dialogue))
        except RuntimeError as error:
            raise OSError(f"cannot write {self.path}: {files.first_line(error)}") from None
        self.info = self.info.plus(dialogue)

    def finish(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the shards and, unless an error is on its way, write dataset.json."""
        for shards in (self.dialogues, self.clips):
            try:
                shards.close()
            except RuntimeError as failure:
                if kind is None:
                    message = f"cannot write {self.path}: {files.first_line(failure)}"
                    raise OSError(message) from None
        if kind is not None:
            return
        if not self.info.dialogues:
            raise ValueError(f"{self.path} would be empty: there is no dialogue to write")
        description = json.dumps(dataclasses.asdict(self.info), indent=1) + "\n"
        (self.directory / "dataset.json").write_text(description)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self.stack.__exit__(kind, error, traceback)

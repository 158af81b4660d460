"""A data set of spoken dialogues on disk: random access, any size, nothing read before it is asked for.

    DIR/dataset.json                                what is in it: the fields of `Info`
    DIR/dialogues-00000-of-00004.array_record       one msgpack record a dialogue, uncompressed by ArrayRecord:
        {id: str, turns: [{role: "user" | "assistant", text: str,
                           clip: index of the turn's recording among all clips, or nil,
                           samples: its length at its rate, 0 without one,
                           units: bytes, little-endian int16, 25 a second, or nil}]}
    DIR/clips-00000-of-00009.array_record           one FLAC file a record, 16-bit mono: user turns at 16 kHz for the speech
                                                    encoder, assistant turns at 24 kHz for the flow

Turns alternate from user to assistant and every user turn has its reply; a text is never empty; a unit is 0..6560. A record
takes its global index from the shards in the order of their names. ArrayRecord checks a hash of every record it reads.
"""

import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import pydantic
import soundfile
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from omni2_jax import files
from omni2_jax.audio import recordings
from omni2_jax.config import SpeechTokenizerConfig

VERSION = 1
RATES = {"user": recordings.INPUT_RATE, "assistant": recordings.OUTPUT_RATE}  # of the clips, in Hz
UNITS = SpeechTokenizerConfig().units
SHARD_BYTES = 512 * 2**20
OPTIONS = "group_size:1,uncompressed"  # a record is read alone; FLAC and units compress no further


class RecordError(ValueError):
    """A record that cannot be used. The message names the data set, the record and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One side's words. units: int32 [U] or None. clip: index for `Dataset.clip`, or None; samples: its length, 0 without one."""

    role: str
    text: str
    units: np.ndarray | None = None
    clip: int | None = None
    samples: int = 0


@dataclass(frozen=True, eq=False)
class Dialogue:
    id: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Info:
    """What dataset.json tells. Durations are in seconds; `units` counts those of all replies."""

    version: int = VERSION
    dialogues: int = 0
    turns: int = 0
    clips: int = 0
    user_clips: int = 0
    user_seconds: float = 0.0
    assistant_clips: int = 0
    assistant_seconds: float = 0.0
    replies_with_units: int = 0
    units: int = 0
    tokenizer: str | None = (
        None  # the checkpoint that made the units which the source did not bring
    )
    fingerprint: str | None = (
        None  # of that tokenizer's parameters, see omni2_jax.units.fingerprint
    )
    user_rate: int = RATES["user"]
    assistant_rate: int = RATES["assistant"]

    def plus(self, dialogue: Dialogue) -> "Info":
        """With one dialogue more."""
        users, replies = dialogue.turns[::2], dialogue.turns[1::2]
        with_units = [len(turn.units) for turn in replies if turn.units is not None]
        added = {
            "dialogues": 1,
            "turns": len(dialogue.turns),
            "clips": sum(turn.clip is not None for turn in dialogue.turns),
            "user_clips": sum(turn.clip is not None for turn in users),
            "user_seconds": sum(turn.samples for turn in users) / self.user_rate,
            "assistant_clips": sum(turn.clip is not None for turn in replies),
            "assistant_seconds": sum(turn.samples for turn in replies) / self.assistant_rate,
            "replies_with_units": len(with_units),
            "units": sum(with_units),
        }
        return dataclasses.replace(
            self, **{name: getattr(self, name) + more for name, more in added.items()}
        )


# ---- records ----


def check(dialogue: Dialogue) -> Dialogue:
    """The dialogue, if it keeps the rules of the format; otherwise ValueError, without a name."""
    if not isinstance(dialogue.id, str):
        raise ValueError(f"its id is {dialogue.id!r}, expected a text")
    if not dialogue.turns or len(dialogue.turns) % 2:
        raise ValueError(
            f"{len(dialogue.turns)} turns; expected the user's and the assistant's in turn, so an even number"
        )
    for number, (turn, role) in enumerate(
        zip(dialogue.turns, itertools.cycle(RATES), strict=False)
    ):
        if turn.role != role:
            raise ValueError(f"turn {number} is of {turn.role!r}, expected {role!r}")
        if not isinstance(turn.text, str) or not turn.text.strip():
            raise ValueError(f"turn {number} has no text")
        if turn.units is not None:
            check_units(turn.units, f"turn {number}")
    return dialogue


def check_units(units: np.ndarray, where: str) -> None:
    bad = units[(units < 0) | (units >= UNITS)]
    if len(bad):
        raise ValueError(f"{where} has the unit {bad[0]}, expected 0 to {UNITS - 1}")
    if not len(units):
        raise ValueError(f"{where} has no units in its units")


def pack(dialogue: Dialogue) -> bytes:
    turns = [
        vars(turn) | {"units": None if turn.units is None else turn.units.astype("<i2").tobytes()}
        for turn in dialogue.turns
    ]
    return msgpack.packb({"id": dialogue.id, "turns": turns})


def unpack(content: bytes) -> Dialogue:
    """Raises ValueError, without a name, for anything that `pack` cannot have written."""
    try:
        record = msgpack.unpackb(content)
        turns = tuple(
            Turn(**fields | {"units": unpack_units(fields["units"])}) for fields in record["turns"]
        )
        dialogue = Dialogue(record["id"], turns)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"no msgpack of a dialogue: {error!r}") from None
    return check(dialogue)


def unpack_units(content: bytes | None) -> np.ndarray | None:
    return None if content is None else np.frombuffer(content, "<i2").astype(np.int32)


def encode(samples: np.ndarray, rate: int) -> bytes:
    """Samples [N] in [-1, 1] as FLAC, 16-bit: those of a 16-bit file come back bit for bit."""
    pcm = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    content = io.BytesIO()
    soundfile.write(content, pcm, rate, format="FLAC", subtype="PCM_16")
    return content.getvalue()


def decode(content: bytes) -> np.ndarray:
    """The samples of a FLAC file, float32 [N]. Raises ValueError, without a name."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples = file.read(dtype="float32")
            expected = file.frames
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"no FLAC: {getattr(error, 'error_string', error)}") from None
    if samples.ndim != 1 or not len(samples) or len(samples) != expected:
        raise ValueError(
            f"FLAC of shape {list(samples.shape)}, expected {expected} samples of one channel"
        )
    return samples


# ---- writing ----


class Shards:
    """Records written into NAME-00000, NAME-00001, ... of about `limit` bytes; `close` puts their number into their names."""

    def __init__(self, directory: Path, name: str, limit: int):
        self.directory, self.name, self.limit = directory, name, limit
        self.paths: list[Path] = []
        self.writer, self.size, self.count = None, 0, 0

    def add(self, record: bytes) -> int:
        """Write a record; its global index."""
        if self.writer is None or self.size + len(record) > self.limit:
            self.finish_shard()
            self.paths.append(self.directory / f"{self.name}-{len(self.paths):05d}")
            self.writer, self.size = ArrayRecordWriter(str(self.paths[-1]), OPTIONS), 0
        self.writer.write(record)
        self.size, self.count = self.size + len(record), self.count + 1
        return self.count - 1

    def finish_shard(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()

    def close(self) -> None:
        self.finish_shard()
        for path in self.paths:
            path.rename(f"{path}-of-{len(self.paths):05d}.array_record")


class Writer(contextlib.AbstractContextManager):
    """Makes a data set: `with Writer(path) as writer: writer.add(...)`.

    `path` appears when the block ends well, and not at all otherwise. shard_bytes: of a file, about. tokenizer and fingerprint
    are for dataset.json. Raises ValueError if `path` exists, cannot be written to, or would be empty.
    """

    def __init__(
        self,
        path: Path,
        shard_bytes: int = SHARD_BYTES,
        tokenizer: str | None = None,
        fingerprint: str | None = None,
    ):
        self.path, self.shard_bytes = Path(path), shard_bytes
        self.info = Info(tokenizer=tokenizer, fingerprint=fingerprint)

    def __enter__(self) -> "Writer":
        with contextlib.ExitStack() as stack:
            self.work = stack.enter_context(files.atomic_directory(self.path))
            stack.push(self.finish)
            self.dialogues = Shards(self.work, "dialogues", self.shard_bytes)
            self.clips = Shards(self.work, "clips", self.shard_bytes)
            self.stack = stack.pop_all()
        return self

    def add(self, dialogue: Dialogue, clips: Sequence[bytes | None] = ()) -> None:
        """Write a dialogue and its turns' recordings, each from `encode`; a turn that has one states its `samples`.

        clips: one a turn, None where there is none; empty for none at all. Raises ValueError if the dialogue breaks a rule.
        """
        check(dialogue)
        clips = clips or [None] * len(dialogue.turns)
        try:
            indices = [None if clip is None else self.clips.add(clip) for clip in clips]
            turns = tuple(
                dataclasses.replace(turn, clip=clip)
                for turn, clip in zip(dialogue.turns, indices, strict=True)
            )
            dialogue = dataclasses.replace(dialogue, turns=turns)
            self.dialogues.add(pack(dialogue))
        except RuntimeError as error:
            raise OSError(f"cannot write {self.path}: {files.first_line(error)}") from None
        self.info = self.info.plus(dialogue)

    def finish(self, kind, *_) -> None:
        """Close the shards and, if all went well, describe them."""
        for shards in (self.dialogues, self.clips):
            try:
                shards.close()
            except RuntimeError as error:
                if kind is None:
                    raise OSError(f"cannot write {self.path}: {files.first_line(error)}") from None
        if kind is None:
            if not self.info.dialogues:
                raise ValueError(f"{self.path} would be empty: there is no dialogue to write")
            (self.work / "dataset.json").write_text(
                json.dumps(dataclasses.asdict(self.info), indent=1) + "\n"
            )

    def __exit__(self, *failure) -> bool | None:
        return self.stack.__exit__(*failure)


# ---- reading ----


class Dataset:
    """A data set made by `Writer`; any thread may read from it, and it can be pickled.

    Raises ValueError, one line naming the directory: no data set, an empty one, one of a newer version, one that lacks shards.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_info(self.path)
        self.dialogues = self.open("dialogues", self.info.dialogues)
        self.clips = self.open("clips", self.info.clips)

    def open(self, name: str, count: int) -> ArrayRecordDataSource | None:
        """The records of all shards of a name, of which there are `count`."""
        paths = sorted(map(str, self.path.glob(f"{name}-*-of-*.array_record")))
        try:
            source = ArrayRecordDataSource(paths) if paths else None
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged, its {name} cannot be opened: {files.first_line(error)}"
            ) from None
        held = 0 if source is None else len(source)
        if held != count:
            raise ValueError(
                f"{self.path} is damaged: its dataset.json tells of {count} {name}, its shards hold {held}"
            )
        return source

    def __len__(self) -> int:
        return self.info.dialogues

    def dialogue(self, index: int) -> Dialogue:
        """Texts and units of a dialogue; cheap. Raises RecordError, IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} dialogues, there is no {index}")
        try:
            dialogue = unpack(self.dialogues[index])
            for number, turn in enumerate(dialogue.turns):
                if turn.clip is not None and not 0 <= turn.clip < self.info.clips:
                    raise ValueError(f"turn {number} names clip {turn.clip} of {self.info.clips}")
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecordError(
                f"{self.path}: dialogue {index} is damaged: {files.first_line(error)}"
            ) from None
        return dialogue

    def clip(self, index: int) -> np.ndarray:
        """A turn's recording, float32 [N] in [-1, 1] at its role's rate. Raises RecordError, IndexError."""
        if not 0 <= index < self.info.clips:
            raise IndexError(f"{self.path} has {self.info.clips} clips, there is no {index}")
        try:
            return decode(self.clips[index])
        except (ValueError, RuntimeError) as error:
            raise RecordError(
                f"{self.path}: clip {index} is damaged: {files.first_line(error)}"
            ) from None


def read_info(directory: Path) -> Info:
    path = directory / "dataset.json"
    try:
        content = path.read_bytes()
    except OSError:
        raise ValueError(
            f"{directory} is no data set: it has no dataset.json; make one with python -m train.prepare"
        ) from None
    try:
        version = json.loads(content)["version"]
        info = None if version > VERSION else pydantic.TypeAdapter(Info).validate_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not describe a data set: {' '.join(str(error).split())}"
        ) from None
    if info is None:
        raise ValueError(
            f"{directory} is a data set of version {version}; this program reads version {VERSION}"
        )
    if not info.dialogues:
        raise ValueError(f"{directory} is empty: it holds no dialogue")
    return info

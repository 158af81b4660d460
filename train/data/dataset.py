"""A data set of spoken dialogues on disk: random access, of any size, read one record at a time.

    DIR/dataset.json                                the fields of `Info`
    DIR/dialogues-00000-of-00004.array_record       the dialogues, see `records`
    DIR/clips-00000-of-00009.array_record           the recordings of their turns, see `records`

A record takes its index from the shards in the order of their names. ArrayRecord checks a hash of
every record it reads.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
from array_record.python.array_record_data_source import ArrayRecordDataSource

from omni2_jax import files, remote
from omni2_jax.train.data.records import RATES, Dialogue, decode_clip, unpack

VERSION = 1


class RecordError(ValueError):
    """A record cannot be used. The message names the data set, the record and the fault."""


@dataclass(frozen=True)
class Info:
    """The content of dataset.json. Durations are in seconds; `units` counts those of all replies.

    tokenizer: the checkpoint whose speech tokenizer made the units that the source lacked, or None;
    fingerprint: of that tokenizer's parameters (`models.speech_tokenizer.fingerprint`).
    """

    version: int = VERSION
    dialogues: int = 0
    recordings: int = 0  # of these dialogues: single recordings with their text
    turns: int = 0
    clips: int = 0
    user_clips: int = 0
    user_seconds: float = 0.0
    assistant_clips: int = 0
    assistant_seconds: float = 0.0
    replies_with_units: int = 0
    units: int = 0
    tokenizer: str | None = None
    fingerprint: str | None = None
    user_rate: int = RATES["user"]
    assistant_rate: int = RATES["assistant"]

    def plus(self, dialogue: Dialogue) -> "Info":
        """The same counts with those of one more dialogue."""
        users = [turn for turn in dialogue.turns if turn.role == "user"]
        replies = dialogue.replies.values()
        unit_counts = [len(turn.units) for turn in replies if turn.units is not None]
        added = {
            "dialogues": 1,
            "recordings": int(dialogue.is_recording),
            "turns": len(dialogue.turns),
            "clips": sum(turn.clip is not None for turn in dialogue.turns),
            "user_clips": sum(turn.clip is not None for turn in users),
            "user_seconds": sum(turn.samples for turn in users) / self.user_rate,
            "assistant_clips": sum(turn.clip is not None for turn in replies),
            "assistant_seconds": sum(turn.samples for turn in replies) / self.assistant_rate,
            "replies_with_units": len(unit_counts),
            "units": sum(unit_counts),
        }
        sums = {name: getattr(self, name) + value for name, value in added.items()}
        return dataclasses.replace(self, **sums)


class Dataset:
    """A data set made by `Writer`. Several threads may read from it, and it can be pickled.

    Raises ValueError, one line naming the directory, if it is no data set, is empty, of a newer
    version, or lacks shards.
    """

    def __init__(self, path: str | Path):
        self.path = remote.as_path(path)
        self.info = read_info(self.path)
        self.files = remote.local_copy(self.path)  # ArrayRecord reads local files only
        self.dialogues = self.open("dialogues", self.info.dialogues)
        self.clips = self.open("clips", self.info.clips)

    def open(self, name: str, count: int) -> ArrayRecordDataSource | None:
        """The records of all shards called `name`; None for a `count` of 0.

        Raises ValueError if they cannot be opened, or hold another number of records than `count`.
        """
        paths = sorted(map(str, self.files.glob(f"{name}-*-of-*.array_record")))
        try:
            source = ArrayRecordDataSource(paths) if paths else None
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged, its {name} cannot be opened: {files.first_line(error)}"
            ) from None
        size = 0 if source is None else len(source)
        if size != count:
            raise ValueError(
                f"{self.path} is damaged: its dataset.json tells of {count} {name}, its shards "
                f"hold {size}"
            )
        return source

    def __len__(self) -> int:
        return self.info.dialogues

    def dialogue(self, index: int) -> Dialogue:
        """Texts and units of a dialogue, without its recordings.

        Raises RecordError if the record is damaged, IndexError if there is none.
        """
        if self.dialogues is None or not 0 <= index < len(self):
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
        """The recording of a turn, float32 [N] in [-1, 1] at its role's rate.

        Raises RecordError if the record is damaged, IndexError if there is none.
        """
        if self.clips is None or not 0 <= index < self.info.clips:
            raise IndexError(f"{self.path} has {self.info.clips} clips, there is no {index}")
        try:
            return decode_clip(self.clips[index])
        except (ValueError, RuntimeError) as error:
            raise RecordError(
                f"{self.path}: clip {index} is damaged: {files.first_line(error)}"
            ) from None


def read_info(directory: Path) -> Info:
    """The content of dataset.json. Raises ValueError, see `Dataset`."""
    path = directory / "dataset.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is no data set: it has no dataset.json; make one with omni2 prepare"
        )
    content = path.read_bytes()
    try:
        version = json.loads(content)["version"]
        info = None if version > VERSION else pydantic.TypeAdapter(Info).validate_json(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not describe a data set: {reason}") from None
    if info is None:
        raise ValueError(
            f"{directory} is a data set of version {version}; this program reads version {VERSION}"
        )
    if not info.dialogues:
        raise ValueError(f"{directory} is empty: it holds no dialogue")
    return info

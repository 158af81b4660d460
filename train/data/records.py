"""Dialogues and recordings, and how each becomes one record of a data set.

A dialogue is a msgpack record:

    {id: str, turns: [{role: "user" | "assistant", text: str,
                       clip: index of the turn's recording among all recordings, or nil,
                       samples: its length at its role's rate, 0 without one,
                       units: bytes, little-endian int16, 25 a second, or nil}]}

Turns alternate from user to assistant and every user turn has its reply; or there is a single
assistant turn, a recording with its text, which the decoder's parts are trained on (`units`,
`flow`). A text is never empty, but for a user's recording in which nobody speaks; it is "<speech>"
for one whose words are not written down. A unit is 0..6560. A recording is a FLAC file, 16-bit
mono: user turns at 16 kHz for the speech encoder, assistant turns at 24 kHz for the flow and the
vocoder.
"""

import io
import itertools
from dataclasses import dataclass
from typing import cast

import msgpack
import numpy as np
import soundfile

from omni2_jax.audio import recordings
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.files import short

RATES = {"user": recordings.INPUT_RATE, "assistant": recordings.OUTPUT_RATE}  # in Hz
UNITS = SpeechTokenizerConfig().units
UNWRITTEN = "<speech>"  # the text of a recorded question whose words are not written down


@dataclass(frozen=True, eq=False)
class Turn:
    """One turn of a dialogue.

    units: int32 [U] or None. clip: the index of the turn's recording for `Dataset.clip`, or None.
    samples: the recording's length, 0 without one.
    """

    role: str
    text: str
    units: np.ndarray | None = None
    clip: int | None = None
    samples: int = 0

    @property
    def is_written(self) -> bool:
        """Whether its text is what is said."""
        return self.text != UNWRITTEN


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A spoken conversation, or a recording with its text; `check` states the rules."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def is_recording(self) -> bool:
        """Whether it is a recording with its text, without a question."""
        return len(self.turns) == 1 and self.turns[0].role == "assistant"

    @property
    def replies(self) -> dict[int, Turn]:
        """The assistant's turns, by their index."""
        return {i: turn for i, turn in enumerate(self.turns) if turn.role == "assistant"}


def check(dialogue: Dialogue) -> Dialogue:
    """The dialogue itself. Raises ValueError, which names the turn, if it breaks a rule."""
    if not isinstance(dialogue.id, str):
        raise ValueError(f"its id is {short(dialogue.id)}, expected a text")
    if not dialogue.turns or (len(dialogue.turns) % 2 and not dialogue.is_recording):
        raise ValueError(
            f"{len(dialogue.turns)} turns; expected the user's and the assistant's in turn, so an "
            "even number"
        )
    roles = ("assistant",) if dialogue.is_recording else itertools.cycle(RATES)
    for number, (turn, role) in enumerate(zip(dialogue.turns, roles, strict=False)):
        if turn.role != role:
            raise ValueError(f"turn {number} is of {short(turn.role)}, expected {role!r}")
        is_silent = role == "user" and turn.text == ""
        if not isinstance(turn.text, str) or not (turn.text.strip() or is_silent):
            raise ValueError(f"turn {number} has no text")
        if turn.units is not None:
            check_units(turn.units, f"turn {number}")
    return dialogue


def check_units(units: np.ndarray, context: str) -> None:
    """Raise ValueError, which begins with `context`, if `units` [U] is empty or out of range."""
    outside = units[(units < 0) | (units >= UNITS)]
    if len(outside):
        raise ValueError(f"{context} has the unit {outside[0]}, expected 0 to {UNITS - 1}")
    if not len(units):
        raise ValueError(f"{context} has no units in its units")


# ---- dialogues ----


def pack(dialogue: Dialogue) -> bytes:
    """A dialogue as a record."""
    turns = [vars(turn) | {"units": pack_units(turn.units)} for turn in dialogue.turns]
    return cast(bytes, msgpack.packb({"id": dialogue.id, "turns": turns}))


def unpack(record: bytes) -> Dialogue:
    """The dialogue of a record. Raises ValueError for anything that `pack` cannot have written."""
    try:
        content = msgpack.unpackb(record)
        turns = tuple(
            Turn(**fields | {"units": unpack_units(fields["units"])}) for fields in content["turns"]
        )
        dialogue = Dialogue(content["id"], turns)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"no msgpack of a dialogue: {error!r}") from None
    return check(dialogue)


def pack_units(units: np.ndarray | None) -> bytes | None:
    """Units int32 [U] as little-endian int16."""
    return None if units is None else units.astype("<i2").tobytes()


def unpack_units(content: bytes | None) -> np.ndarray | None:
    """Units int32 [U] from little-endian int16. Raises ValueError for half a unit."""
    return None if content is None else np.frombuffer(content, "<i2").astype(np.int32)


# ---- recordings ----


def encode_clip(samples: np.ndarray, rate: int) -> bytes:
    """Samples [N] in [-1, 1] as a recording of a data set: `recordings.encode`."""
    return recordings.encode(samples, rate)


def decode_clip(content: bytes) -> np.ndarray:
    """The samples of a FLAC file, float32 [N]. Raises ValueError if it is damaged."""
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

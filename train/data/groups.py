"""Groups of dialogues: recordings are read, units made, and the whole is packed as one file.

Dialogues are read in groups so that recordings of like length share a batch of the speech
tokenizer. A group is a msgpack list with an object for each dialogue:

    {context, dialogue: see `records.pack`, clips: [FLAC or nil for each turn]}
    {context, kind, message}    for one that cannot be used
"""

import dataclasses
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgpack
import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.jobs import Result
from omni2_jax.models.speech_tokenizer import SpeechTokenizer
from omni2_jax.models.speech_tokenizer import load as load_speech_tokenizer
from omni2_jax.train.data.records import RATES, Dialogue, encode_clip, pack, unpack
from omni2_jax.train.data.sources import Entry, Sound, SourceError
from omni2_jax.train.data.unit_batches import batched_units

# A recording whose loudest sample is below this is silence: -54 dB of full scale.
SILENCE = 2e-3


@dataclass(frozen=True)
class Prepared:
    """A dialogue to be written.

    clips: each turn's recording from `encode_clip`, or None. untokenized: by the index of the turn,
    recordings [N] at 16 kHz of the replies that still lack units.
    """

    dialogue: Dialogue
    clips: tuple[bytes | None, ...]
    untokenized: dict[int, np.ndarray]

    def with_units(self, units: dict[int, np.ndarray]) -> "Prepared":
        """The same with units [U] of turns, by their index."""
        turns = [
            dataclasses.replace(turn, units=units.get(index, turn.units))
            for index, turn in enumerate(self.dialogue.turns)
        ]
        return Prepared(dataclasses.replace(self.dialogue, turns=tuple(turns)), self.clips, {})


class GroupWorker:
    """Prepares groups of dialogues. Several threads may call it; one of them tokenizes at a time.

    tokenizer: the speech tokenizer, or the checkpoint that holds it; None makes no units. batch:
    recordings that it processes at once. max_seconds: of a recording. strict: raise ValueError at
    the first dialogue that cannot be used, naming `source`.
    """

    def __init__(
        self,
        source: Path,
        tokenizer: SpeechTokenizer | Path | None,
        batch: int,
        max_seconds: float,
        strict: bool,
    ):
        if isinstance(tokenizer, Path):
            tokenizer = load_speech_tokenizer(tokenizer)
        self.source, self.tokenizer = source, tokenizer
        self.batch, self.max_seconds, self.strict = batch, max_seconds, strict
        self.readers = ThreadPoolExecutor(os.cpu_count())
        self.tokenizing = threading.Lock()

    def __call__(self, group: tuple[str, Sequence[Entry]]) -> Result:
        """The file of a group. group: the name of the file, and the dialogues."""
        name, entries = group

        def read(entry: Entry) -> Prepared | SourceError:
            return prepared(entry, self.tokenizer is not None, self.max_seconds)

        dialogues = list(self.readers.map(read, entries))
        if self.strict:
            for entry, dialogue in zip(entries, dialogues, strict=True):
                if isinstance(dialogue, SourceError):
                    raise ValueError(f"{self.source}: {entry.context}: {dialogue}")
        if self.tokenizer is not None:
            with self.tokenizing:
                dialogues = tokenized(dialogues, self.tokenizer, self.batch)
        return Result(len(entries), {name: pack_group(entries, dialogues)})


def tokenized(
    dialogues: Sequence[Prepared | SourceError], tokenizer: SpeechTokenizer, batch: int
) -> list[Prepared | SourceError]:
    """The same dialogues, with units for the replies that lacked them."""
    places, wavs = [], []
    for number, dialogue in enumerate(dialogues):
        if isinstance(dialogue, Prepared):
            for turn, wav in dialogue.untokenized.items():
                places.append((number, turn))
                wavs.append(wav)
    units: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    rows = batched_units(tokenizer, wavs, batch)
    for (number, turn), row in zip(places, rows, strict=True):
        units[number][turn] = row
    return [
        dialogue.with_units(units[number]) if isinstance(dialogue, Prepared) else dialogue
        for number, dialogue in enumerate(dialogues)
    ]


# ---- the file of a group ----


def pack_group(entries: Sequence[Entry], dialogues: Sequence[Prepared | SourceError]) -> bytes:
    """A group as a file."""
    content = []
    for entry, dialogue in zip(entries, dialogues, strict=True):
        if isinstance(dialogue, Prepared):
            fields = {"dialogue": pack(dialogue.dialogue), "clips": dialogue.clips}
        else:
            fields = {"kind": dialogue.kind, "message": str(dialogue)}
        content.append({"context": entry.context, **fields})
    return cast(bytes, msgpack.packb(content))


def unpack_group(content: bytes) -> Iterator[tuple[str, Prepared | SourceError]]:
    """The dialogues of a group's file, each with what names it in messages."""
    for fields in msgpack.unpackb(content):
        if "dialogue" in fields:
            dialogue = Prepared(unpack(fields["dialogue"]), tuple(fields["clips"]), {})
        else:
            dialogue = SourceError(fields["kind"], fields["message"])
        yield fields["context"], dialogue


# ---- recordings ----


def prepared(entry: Entry, tokenize: bool, max_seconds: float) -> Prepared | SourceError:
    """An entry with its recordings, or what is wrong with it.

    tokenize: whether replies without units are to get them.
    """
    try:
        source = entry.read()
        if source.dialogue.is_recording:
            check_rate(source.sounds[0])
        clips, turns, untokenized = [], [], {}
        turns_and_sounds = zip(source.dialogue.turns, source.sounds, strict=True)
        for index, (turn, sound) in enumerate(turns_and_sounds):
            clip, count = None, 0
            if sound is not None:
                samples = load(sound, RATES[turn.role], index, max_seconds)
                if source.dialogue.is_recording and np.max(np.abs(samples)) < SILENCE:
                    raise SourceError("silence", f"{sound} holds no sound")
                clip, count = encode_clip(samples, RATES[turn.role]), len(samples)
                if tokenize and turn.role == "assistant" and turn.units is None:
                    untokenized[index] = load(sound, recordings.INPUT_RATE, index, max_seconds)
            clips.append(clip)
            turns.append(dataclasses.replace(turn, samples=count))
        dialogue = dataclasses.replace(source.dialogue, turns=tuple(turns))
        return Prepared(dialogue, tuple(clips), untokenized)
    except SourceError as error:
        return error


def check_rate(sound: Sound | None) -> None:
    """Raise SourceError for a recording of a voice that is missing, or of a rate below 16 kHz.

    The mel spectra reach up to 8 kHz: a decoder must not learn that there is nothing above 4 kHz.
    """
    if sound is None:
        raise SourceError("no audio", "there is no 'audio'")
    if isinstance(sound, Path) and not os.path.exists(sound):
        raise SourceError("audio missing", f"{sound} does not exist")
    try:
        with recordings.open_audio(sound) as file:
            rate = file.samplerate
    except ValueError as error:
        raise SourceError("audio unreadable", str(error)) from None
    if rate < recordings.INPUT_RATE:
        message = f"{sound} has a rate of {rate} Hz, expected at least {recordings.INPUT_RATE} Hz"
        raise SourceError("rate too low", message)


def load(sound: Sound, rate: int, turn: int, max_seconds: float) -> np.ndarray:
    """The recording [N] of a turn, at `rate` Hz.

    Raises SourceError if it is missing, unreadable, or not between 10 ms and `max_seconds` long.
    """
    if isinstance(sound, Path) and not os.path.exists(sound):
        raise SourceError("audio missing", f"turn {turn}: {sound} does not exist")
    try:
        samples = recordings.load(sound, rate, max_seconds)
    except ValueError as error:
        raise SourceError("audio unreadable", f"turn {turn}: {error}") from None
    if len(samples) * 100 < rate:
        message = f"turn {turn}: {sound} has {len(samples)} samples at {rate} Hz, less than 10 ms"
        raise SourceError("audio too short", message)
    return samples

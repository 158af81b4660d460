"""Recorded dialogues of a source become a data set that `omni2 train` reads.

A recording of a voice with its text is a dialogue of one turn, the assistant's: its text and its
samples at 24 kHz are what the stages of the decoder read. Recordings are resampled and stored.
Replies that bring a recording but no units get them from the speech tokenizer, in batches of a few
fixed lengths. Dialogues that cannot be used are counted, named and left out. A user's turn over
30 s is kept whole: training examples cut it into segments.
"""

import contextlib
import dataclasses
import itertools
import os
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
import rich.progress
import rich.table
import rich.text

from omni2_jax.audio import recordings
from omni2_jax.cli.console import console, progress_bar
from omni2_jax.models.speech_tokenizer import SpeechTokenizer, fingerprint, tokenize
from omni2_jax.models.speech_tokenizer import load as load_speech_tokenizer
from omni2_jax.train.data import sources
from omni2_jax.train.data.dataset import Info
from omni2_jax.train.data.records import RATES, Dialogue, encode_clip
from omni2_jax.train.data.sources import Entry, Sound, SourceError
from omni2_jax.train.data.writer import SHARD_BYTES, Writer

# Seconds that a batch of recordings is padded to; over 30 s to 60, 120, 240 and so on.
BATCH_SECONDS = (3, 6, 10, 15, 20, 30)
# Batches of dialogues that are read at once, so that recordings of like length share a batch.
GROUP_BATCHES = 4
MAX_BATCH = 1024
# A recording whose loudest sample is below this is silence: -54 dB of full scale.
SILENCE = 2e-3
MAX_NAMED = 3  # dialogues left out that are named for each kind of fault

Item = TypeVar("Item")


def prepare(
    source: Path,
    out: Path,
    format: str | None = None,
    speech_tokenizer: Path | None = None,
    strict: bool = False,
    shard_mb: int = SHARD_BYTES // 2**20,
    batch: int = 16,
    max_seconds: float = 600,
    split: str | None = None,
) -> None:
    """Make a data set; the parameters are those of `omni2 prepare`.

    Raises ValueError if `source` cannot be read, `out` exists or cannot be written to, no dialogue
    can be used or, when strict, one cannot. Then `out` is not there.
    """
    if not 0 < max_seconds <= recordings.MAX_SECONDS:
        raise ValueError(
            f"max_seconds is {max_seconds:g}; expected more than 0, up to {recordings.MAX_SECONDS}"
        )
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; expected 1 to {MAX_BATCH}")
    entries = sources.read(source, format, split)
    if out.exists():
        raise ValueError(f"{out} exists already; give a new directory")
    tokenizer, origin = None, {}
    if speech_tokenizer is not None:
        tokenizer = load_speech_tokenizer(speech_tokenizer)
        origin = {"tokenizer": str(speech_tokenizer), "fingerprint": fingerprint(tokenizer)}
    damaged = Damaged()
    reading = read_groups(entries, tokenizer is not None, GROUP_BATCHES * batch, max_seconds)
    with (
        Writer(out, shard_mb * 2**20, **origin) as writer,
        progress_bar(rich.progress.TaskProgressColumn()) as progress,
        contextlib.closing(reading) as groups,
    ):
        task = progress.add_task("preparing", total=1.0)
        for entry, result in tokenized(groups, tokenizer, batch):
            if isinstance(result, Prepared):
                writer.add(result.dialogue, result.clips)
            elif strict:
                raise ValueError(f"{source}: {entry.context}: {result}")
            else:
                damaged.add(result.kind, f"{entry.context}: {result}")
            description = f"{writer.info.dialogues} dialogues"
            progress.update(task, completed=entry.done, description=description)
        if not writer.info.dialogues:
            reason = damaged.summary() or "it holds no dialogue"
            raise ValueError(f"nothing of {source} can be used: {reason}")
    report(out, writer.info, damaged)


# ---- recordings ----


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


Group = list[tuple[Entry, Prepared | SourceError]]


def read_groups(
    entries: Iterator[Entry], tokenize: bool, size: int, max_seconds: float
) -> Generator[Group, None, None]:
    """The dialogues in groups of `size`. Threads read a group while the one before it is in use.

    tokenize: whether replies without units are to get them.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead: deque[list[tuple[Entry, Future[Prepared | SourceError]]]] = deque()
    try:
        for group in itertools.chain(batches(entries, size), ([],)):
            ahead.append(
                [(entry, pool.submit(prepared, entry, tokenize, max_seconds)) for entry in group]
            )
            if len(ahead) > 1:
                yield [(entry, future.result()) for entry, future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def prepared(entry: Entry, tokenize: bool, max_seconds: float) -> Prepared | SourceError:
    """An entry with its recordings, or what is wrong with it. tokenize: see `read_groups`."""
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


# ---- units ----


def tokenized(
    groups: Iterable[Group], tokenizer: SpeechTokenizer | None, batch: int
) -> Iterator[tuple[Entry, Prepared | SourceError]]:
    """Every dialogue in order, with units for the replies that lacked them."""
    for group in groups:
        places, wavs = [], []
        for number, (_, result) in enumerate(group):
            if isinstance(result, Prepared):
                for turn, wav in result.untokenized.items():
                    places.append((number, turn))
                    wavs.append(wav)
        units: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
        if tokenizer is not None:
            rows = batched_units(tokenizer, wavs, batch)
            for (number, turn), row in zip(places, rows, strict=True):
                units[number][turn] = row
        for number, (entry, result) in enumerate(group):
            if isinstance(result, Prepared):
                result = result.with_units(units[number])
            yield entry, result


def batched_units(
    tokenizer: SpeechTokenizer, wavs: Sequence[np.ndarray], batch: int
) -> list[np.ndarray]:
    """The units int32 [U] of each recording [N] at 16 kHz.

    Recordings of like length share a batch, and batches have one of a few shapes.
    """
    order = sorted(range(len(wavs)), key=lambda index: len(wavs[index]))
    running = []
    for indices in batches(order, batch):
        size = fixed_length(len(wavs[indices[-1]]))
        padded, lengths = recordings.pad([wavs[index] for index in indices], size)
        empty = (0, batch - len(indices))
        padded = jnp.asarray(np.pad(padded, (empty, (0, 0))))
        codes = tokenize(tokenizer, padded, jnp.asarray(np.pad(lengths, empty)))
        running.append((indices, codes))
    units: dict[int, np.ndarray] = {}
    for indices, (codes, counts) in running:  # fetched when all are dispatched
        codes, counts = np.asarray(codes), np.asarray(counts)
        units |= {index: codes[row, : counts[row]] for row, index in enumerate(indices)}
    return [units[index] for index in range(len(wavs))]


def fixed_length(samples: int) -> int:
    """The samples that a batch is padded to whose longest recording has `samples`."""
    for seconds in BATCH_SECONDS:
        if samples <= seconds * recordings.INPUT_RATE:
            return seconds * recordings.INPUT_RATE
    size = BATCH_SECONDS[-1] * recordings.INPUT_RATE
    while size < samples:
        size *= 2
    return size


# ---- the closing report ----


@dataclass
class Damaged:
    """Dialogues left out: how many for each kind of fault, and what is said of the first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, message: str) -> None:
        """Count a dialogue."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_NAMED:
            self.messages[kind].append(message)

    def summary(self) -> str:
        """All kinds in one line, each with its first message."""
        return "; ".join(
            f"{count} x {kind} (first: {self.messages[kind][0]})"
            for kind, count in self.counts.items()
        )


def report(out: Path, info: Info, damaged: Damaged) -> None:
    """Print what the data set at `out` holds, and what was left out."""
    questions = (info.turns - info.recordings) // 2
    replies = questions + info.recordings
    rows = {
        "dialogues": f"{info.dialogues:,}",
        "turns": f"{info.turns:,}",
        "questions recorded": (
            f"{info.user_clips:,} of {questions:,}: {duration(info.user_seconds)}"
        ),
        "replies recorded": (
            f"{info.assistant_clips:,} of {replies:,}: {duration(info.assistant_seconds)}"
        ),
        "replies with units": (f"{info.replies_with_units:,} of {replies:,}: {info.units:,} units"),
    }
    if info.tokenizer:
        rows["speech tokenizer"] = f"{info.tokenizer} ({info.fingerprint})"
    for kind, count in damaged.counts.items():
        more = ["..."] if count > MAX_NAMED else []
        rows[f"left out: {kind}"] = "\n".join([f"{count:,}", *damaged.messages[kind], *more])
    table = rich.table.Table(show_header=False, title=rich.text.Text(str(out)))
    for name, value in rows.items():
        table.add_row(rich.text.Text(name), rich.text.Text(value))
    console.print(table)
    if info.replies_with_units < questions and not info.tokenizer:
        console.print(
            "replies without units are of use to stage I(a) only; --speech-tokenizer makes units "
            "of recordings",
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    """Seconds for the report."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"

"""Recorded dialogues, however they are kept, become a data set that `omni2 train` reads.

Recordings are resampled and stored, and replies that bring a recording but no units get theirs from the speech tokenizer,
which hears a batch of one of a few fixed lengths at a time. What cannot be used is counted, named and left out. A user's turn
over 30 s is kept whole: it becomes several clips when a training example is made of it.
"""

import contextlib
import dataclasses
import itertools
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.console
import rich.progress
import rich.table

from omni2_jax.audio import recordings
from omni2_jax.cli.console import console, progress_bar
from omni2_jax.models.speech_tokenizer import SpeechTokenizer, fingerprint, tokenize
from omni2_jax.models.speech_tokenizer import load as load_speech_tokenizer
from omni2_jax.train.data import sources
from omni2_jax.train.data.dataset import Info
from omni2_jax.train.data.records import RATES, Dialogue, encode_clip
from omni2_jax.train.data.sources import Entry, SourceError
from omni2_jax.train.data.writer import SHARD_BYTES, Writer

SECONDS = (
    3,
    6,
    10,
    15,
    20,
    30,
)  # a batch of recordings is padded to one of these; over 30 s to 60, 120, 240 ...
WINDOW = (
    4  # batches of dialogues that are read at once, so that neighbours in length can share a batch
)
MAX_NAMED = 3  # of the dialogues left out for a reason, so many are named


def prepare(
    source: Path,
    out: Path,
    format: str | None = None,
    speech_tokenizer: Path | None = None,
    strict: bool = False,
    shard_mb: int = SHARD_BYTES // 2**20,
    batch: int = 16,
) -> None:
    """Make a data set of spoken dialogues; the parameters are those of `omni2 prepare`."""
    entries = sources.read(source, format)
    if out.exists():
        raise ValueError(f"{out} exists already; give a new directory")
    tokenizer = None if speech_tokenizer is None else load_speech_tokenizer(speech_tokenizer)
    made_by = (
        {}
        if tokenizer is None
        else {
            "tokenizer": str(speech_tokenizer),
            "fingerprint": fingerprint(tokenizer),
        }
    )
    damaged: dict[str, list[str]] = defaultdict(list)
    reading = contextlib.closing(loaded(entries, tokenizer is not None, WINDOW * batch))
    with (
        Writer(out, shard_mb * 2**20, **made_by) as writer,
        progress_bar(rich.progress.TaskProgressColumn()) as progress,
        reading as windows,
    ):
        task = progress.add_task("preparing", total=1.0)
        for entry, result in tokenized(windows, tokenizer, batch):
            if isinstance(result, Prepared):
                writer.add(result.dialogue, result.clips)
            elif strict:
                raise ValueError(f"{source}: {entry.where}: {result}")
            else:
                damaged[result.kind].append(f"{entry.where}: {result}")
            progress.update(
                task, completed=entry.done, description=f"{writer.info.dialogues} dialogues"
            )
        if not writer.info.dialogues:
            raise ValueError(
                f"nothing of {source} can be used: {summary(damaged) or 'it holds no dialogue'}"
            )
    report(out, writer.info, damaged)


# ---- recordings ----


@dataclass(frozen=True)
class Prepared:
    """A dialogue with its recordings as FLAC, one or None a turn, and by turn what the speech tokenizer has to hear, at 16 kHz."""

    dialogue: Dialogue
    clips: tuple[bytes | None, ...]
    unheard: dict[int, np.ndarray]

    def with_units(self, made: dict[int, np.ndarray]) -> "Prepared":
        turns = [
            dataclasses.replace(turn, units=made.get(i, turn.units))
            for i, turn in enumerate(self.dialogue.turns)
        ]
        return Prepared(dataclasses.replace(self.dialogue, turns=tuple(turns)), self.clips, {})


def loaded(
    entries: Iterator[Entry], hear: bool, size: int
) -> Iterator[list[tuple[Entry, Prepared | SourceError]]]:
    """The dialogues in groups of `size`, each read in threads while the one before it is at work. hear: replies may need units."""
    pool, ahead = ThreadPoolExecutor(os.cpu_count()), deque[list[tuple[Entry, Future]]]()
    try:
        for group in itertools.chain(groups(entries, size), ([],)):
            ahead.append([(entry, pool.submit(load, entry, hear)) for entry in group])
            if len(ahead) > 1:
                yield [(entry, future.result()) for entry, future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def load(entry: Entry, hear: bool) -> Prepared | SourceError:
    """Read an entry's recordings; what is wrong with it, if it cannot be used."""
    try:
        source = entry.read()
        clips, turns, unheard = [], [], {}
        for index, (turn, path) in enumerate(
            zip(source.dialogue.turns, source.sounds, strict=True)
        ):
            samples = np.zeros(0) if path is None else sound(path, RATES[turn.role], index)
            clips.append(encode_clip(samples, RATES[turn.role]) if len(samples) else None)
            turns.append(dataclasses.replace(turn, samples=len(samples)))
            if hear and path is not None and turn.role == "assistant" and turn.units is None:
                unheard[index] = sound(path, recordings.INPUT_RATE, index)
        return Prepared(
            dataclasses.replace(source.dialogue, turns=tuple(turns)), tuple(clips), unheard
        )
    except SourceError as damaged:
        return damaged


def sound(path: Path, rate: int, turn: int) -> np.ndarray:
    """A recording [N] at `rate` Hz. Raises SourceError."""
    if not path.is_file():
        raise SourceError("audio missing", f"turn {turn}: {path} does not exist")
    try:
        samples = recordings.load(path, rate)
    except ValueError as error:
        raise SourceError("audio unreadable", f"turn {turn}: {error}") from None
    if len(samples) * 100 < rate:
        raise SourceError(
            "audio too short",
            f"turn {turn}: {path} has {len(samples)} samples at {rate} Hz, less than 10 ms",
        )
    return samples


# ---- units ----


def tokenized(
    windows: Iterable[list[tuple[Entry, Prepared | SourceError]]],
    tokenizer: SpeechTokenizer | None,
    batch: int,
) -> Iterator[tuple[Entry, Prepared | SourceError]]:
    """Every dialogue in order, with the units of the replies that the tokenizer had to hear."""
    for window in windows:
        heard = [
            (i, turn, wav)
            for i, (_, item) in enumerate(window)
            if isinstance(item, Prepared)
            for turn, wav in item.unheard.items()
        ]
        made: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
        for (i, turn, _), row in zip(
            heard, batched_units(tokenizer, [wav for *_, wav in heard], batch), strict=True
        ):
            made[i][turn] = row
        for i, (entry, item) in enumerate(window):
            yield entry, item.with_units(made[i]) if isinstance(item, Prepared) else item


def batched_units(
    tokenizer: SpeechTokenizer | None, wavs: Sequence[np.ndarray], batch: int
) -> list[np.ndarray]:
    """The units int32 [U] of recordings [N] at 16 kHz, those of similar length in a batch of one of a few shapes."""
    order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))
    running = []
    for some in groups(order, batch):
        wav, lengths = recordings.pad([wavs[i] for i in some], fixed_length(len(wavs[some[-1]])))
        rows = (0, batch - len(some))
        running.append(
            (some, tokenize(tokenizer, np.pad(wav, (rows, (0, 0))), np.pad(lengths, rows)))
        )
    made = {}
    for some, (codes, counts) in running:  # fetched when all are under way
        made |= {
            i: row[:count]
            for i, row, count in zip(some, np.asarray(codes), np.asarray(counts), strict=False)
        }
    return [made[i] for i in range(len(wavs))]


def fixed_length(samples: int) -> int:
    """The samples that a batch is padded to."""
    lengths = itertools.chain(SECONDS, (SECONDS[-1] * 2**i for i in itertools.count(1)))
    return next(
        seconds * recordings.INPUT_RATE
        for seconds in lengths
        if seconds * recordings.INPUT_RATE >= samples
    )


# ---- telling ----


def summary(damaged: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} x {kind} (first: {names[0]})" for kind, names in damaged.items()
    )


def report(out: Path, info: Info, damaged: dict[str, list[str]]) -> None:
    """A closing table."""
    table, replies = rich.table.Table(show_header=False, title=str(out)), info.turns // 2
    table.add_row("dialogues", f"{info.dialogues:,}")
    table.add_row("turns", f"{info.turns:,}")
    table.add_row(
        "questions recorded", f"{info.user_clips:,} of {replies:,}: {duration(info.user_seconds)}"
    )
    table.add_row(
        "replies recorded",
        f"{info.assistant_clips:,} of {replies:,}: {duration(info.assistant_seconds)}",
    )
    table.add_row(
        "replies with units", f"{info.replies_with_units:,} of {replies:,}: {info.units:,} units"
    )
    if info.tokenizer:
        table.add_row("speech tokenizer", f"{info.tokenizer} ({info.fingerprint})")
    for kind, names in damaged.items():
        more = ["..."] if len(names) > MAX_NAMED else []
        table.add_row(
            f"left out: {kind}", "\n".join([f"{len(names):,}", *names[:MAX_NAMED], *more])
        )
    console.print(table, markup=False)
    if info.replies_with_units < replies and not info.tokenizer:
        console.print(
            "replies without units are of use to stage I(a) only; --speech-tokenizer makes units of recordings",
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"

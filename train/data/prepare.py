"""Recorded dialogues of a source become a data set that `omni2 train` reads.

A recording of a voice with its text is a dialogue of one turn, the assistant's: its text and its
samples at 24 kHz are what the stages of the decoder read. Recordings are resampled and stored.
Replies that bring a recording but no units get them from the speech tokenizer, in batches of a few
fixed lengths. Dialogues that cannot be used are counted, named and left out. A user's turn over
30 s is kept whole: training examples cut it into segments.

Groups of dialogues (`groups`) are the items of a job. Their files lie in OUT.work until the data
set is written from them.
"""

import contextlib
import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import rich.progress
import rich.table
import rich.text

from omni2_jax import files, jobs, remote
from omni2_jax.audio import recordings
from omni2_jax.console import console, progress_bar
from omni2_jax.models.speech_tokenizer import fingerprint
from omni2_jax.models.speech_tokenizer import load as load_speech_tokenizer
from omni2_jax.train.data import sources
from omni2_jax.train.data.dataset import Info
from omni2_jax.train.data.groups import GroupWorker, Prepared, unpack_group
from omni2_jax.train.data.records import UNITS
from omni2_jax.train.data.sources import Entry
from omni2_jax.train.data.unit_batches import batches
from omni2_jax.train.data.writer import SHARD_BYTES, Writer

# Batches of dialogues in a group.
GROUP_BATCHES = 4
MAX_BATCH = 1024
MAX_NAMED = 3  # dialogues left out that are named for each kind of fault


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
    where: jobs.Where = jobs.HERE,
) -> None:
    """Make a data set; the parameters are those of `omni2 prepare`.

    Where it was killed, the same call goes on. Nothing is written after one shard of several.

    Raises ValueError if `source` cannot be read, `out` exists or cannot be written to, no dialogue
    can be used or, when strict, one cannot. Then `out` is not there.
    """
    if not 0 < max_seconds <= recordings.MAX_SECONDS:
        raise ValueError(
            f"max_seconds is {max_seconds:g}; expected more than 0, up to {recordings.MAX_SECONDS}"
        )
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; expected 1 to {MAX_BATCH}")
    if where.ray is not None:
        source = source.absolute()  # Ray's workers have other working directories
    entries = sources.read(source, format, split)
    files.check_new(out)
    tokenizer, origin = None, {}
    if speech_tokenizer is not None:
        tokenizer = load_speech_tokenizer(speech_tokenizer)
        if tokenizer.config.units > UNITS:
            raise ValueError(
                f"{speech_tokenizer} makes {tokenizer.config.units} different units; a data set "
                f"holds {UNITS} at most"
            )
        origin = {"tokenizer": str(speech_tokenizer), "fingerprint": fingerprint(tokenizer)}
    if where.ray is not None and speech_tokenizer is not None:
        tokenizer = remote.absolute(speech_tokenizer)  # each worker loads it
    settings = {"source": str(source.absolute()), "bytes": sources.size(source), "format": format}
    settings |= {"split": split, "batch": batch, "max_seconds": max_seconds, **origin}
    make = functools.partial(GroupWorker, source, tokenizer, batch, max_seconds, strict)
    with work_directory(out) as directory:
        job = jobs.Job("groups of dialogues", directory, settings, make, workers=2)
        results = job.run(groups(entries, GROUP_BATCHES * batch), where)
        if results is None:
            return
        damaged = Damaged()
        with Writer(out, shard_mb * 2**20, **origin) as writer:
            write(results, writer, damaged, source if strict else None)
            if not writer.info.dialogues:
                reason = damaged.summary() or "it holds no dialogue"
                raise UnusableError(f"nothing of {source} can be used: {reason}")
    report(out, writer.info, damaged)


def groups(entries: Iterator[Entry], size: int) -> Iterator[jobs.Item]:
    """The dialogues in groups of `size`, as items of a job."""
    for number, group in enumerate(batches(entries, size)):
        name = f"groups/{number:06d}.msgpack"
        contexts = json.dumps([entry.context for entry in group])
        digest = hashlib.sha256(contexts.encode()).hexdigest()[:16]
        yield jobs.Item(name, (name, group), digest, group[-1].done)


class UnusableError(ValueError):
    """Nothing of a source can be used."""


@contextlib.contextmanager
def work_directory(out: Path) -> Iterator[Path]:
    """The directory for the job of a data set, beside it: OUT.work.

    It is removed when the data set is there, or none can be made of the source; otherwise it stays,
    so that the same command goes on.
    """
    directory = out.with_name(f"{out.name}.work")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        yield directory
    except UnusableError:
        files.remove_directory(directory)
        with contextlib.suppress(OSError):
            for parent in new_parents:
                parent.rmdir()
        raise
    if files.exists(out):
        files.remove_directory(directory)


def write(
    results: jobs.Results, writer: Writer, damaged: "Damaged", strict_source: Path | None
) -> None:
    """Write the dialogues of all groups, in order.

    Raises ValueError at the first one that cannot be used if there is a `strict_source`, naming it.
    """
    with progress_bar(rich.progress.TaskProgressColumn()) as progress:
        task = progress.add_task("writing", total=len(results))
        for outcome in results:
            for context, dialogue in unpack_group((results.directory / outcome.key).read_bytes()):
                if isinstance(dialogue, Prepared):
                    writer.add(dialogue.dialogue, dialogue.clips)
                elif strict_source is not None:
                    raise ValueError(f"{strict_source}: {context}: {dialogue}")
                else:
                    damaged.add(dialogue.kind, f"{context}: {dialogue}")
            description = f"{writer.info.dialogues:,} dialogues written"
            progress.update(task, advance=1, description=description)


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
            "replies without units are of use to stage 1a only; --speech-tokenizer makes units "
            "of recordings",
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    """Seconds for the report."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"

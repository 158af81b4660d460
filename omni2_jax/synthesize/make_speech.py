"""What `omni2 synthesize speech` does: dialogues become recordings that `omni2 prepare` reads.

In the directory it makes:

    train.jsonl, validation.jsonl, test.jsonl   a dialogue a line:
        {"id", "split", "topic", "voices": "seen" | "unseen", "voice": "ENGINE/NAME", "turns": [
            {"role", "text", "audio", "seconds", "answers", "topic", "augment", "wer"}]}
        Replies that are not spoken have no "audio".
    clips/         the recordings: questions at 16 kHz, replies at 24 kHz
    left_out.jsonl the dialogues that could not be spoken: {"id", "reason", "message"}
    journal-...    what is finished: the same command goes on where a killed one stopped

Of a text file, each line is a sentence, which the voice of the replies speaks:

    metadata.jsonl  {"id", "text", "audio", "seconds", "wer"}

Dialogues whose split is not "seen" are for the test; half of them are spoken in voices that are
held out. Of the others, one share is for the validation, and one, in held-out voices, for the test.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich.table

from omni2_jax import files
from omni2_jax.console import console, say
from omni2_jax.jobs import Item, Job, Results, Where
from omni2_jax.synthesize.engines import open_engine
from omni2_jax.synthesize.records import TextDialogue, read_dialogues
from omni2_jax.synthesize.speaker import Speaker, SpeakerOptions, number_of
from omni2_jax.synthesize.voices import VoicesFile

PLACES = ("train", "validation", "test")


@dataclass(frozen=True)
class Shares:
    """Of the dialogues of the split "seen": those for the validation, and those for the test."""

    validation: float = 0.01
    test: float = 0.01


def synthesize_speech(
    dialogues: Path,
    voices: VoicesFile,
    out: Path,
    options: SpeakerOptions,
    shares: Shares,
    where: Where,
    workers: int,
) -> None:
    """Speak all dialogues of a .jsonl file, or all lines of a .txt file, into the directory `out`.

    workers: dialogues that are spoken at the same time, unless `where` says otherwise. Raises
    ValueError, before anything is spoken, if the dialogues cannot be read, or an engine or a voice
    is not there.
    """
    is_text = holds_sentences(dialogues)
    name = "sentences" if is_text else "dialogues"

    def items() -> Iterator[Item]:
        if is_text:
            return sentences(dialogues)
        held_out = bool(voices.held_out)
        return (
            Item(one.id, payload(one, options.seed, shares, held_out))
            for one in read_dialogues(dialogues)
        )

    total = sum(1 for _ in items())
    if not total:
        raise ValueError(f"{dialogues} holds no {name}")
    with console.status("checking engines and voices"):
        for engine, names in voices.used(replies_only=is_text).items():
            open_engine(engine, voices.engines[engine]).check(names)
    settings = asdict(options) | asdict(shares) | {"voices": voices.digest()}
    job = Job(name, out, settings, functools.partial(Speaker, voices, options), workers)
    results = job.run(items(), where, total)
    if results is None:
        return
    if is_text:
        write_lines(results, out / "metadata.jsonl", lambda value: value)
    else:
        write_manifests(results, out)
    write_left_out(results, out / "left_out.jsonl")
    say(results.summary())


def holds_sentences(path: Path) -> bool:
    """Whether a file is one of sentences, not of dialogues."""
    return path.suffix == ".txt"


def sentences(path: Path) -> Iterator[Item]:
    """The lines of a text file as items. Raises ValueError if it is no text."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    name = f"s{number:06d}"
                    yield Item(name, {"id": name, "text": line.strip()})
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def payload(dialogue: TextDialogue, seed: int, shares: Shares, held_out: bool) -> dict[str, Any]:
    """A dialogue with the manifest that it belongs to, and whether its voice is held out.

    held_out: whether there are held-out voices.
    """
    drawn = number_of(f"{seed}/{dialogue.id}/place") / 2**31
    place, unseen = "train", False
    if dialogue.split != "seen":
        place, unseen = "test", drawn < 0.5
    elif drawn < shares.validation:
        place = "validation"
    elif drawn < shares.validation + shares.test:
        place, unseen = "test", True
    voices = "unseen" if unseen and held_out else "seen"
    return asdict(dialogue) | {"place": place, "voices": voices}


# ---- results ----


@dataclass
class Count:
    """What a manifest holds."""

    dialogues: int = 0
    turns: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"user": 0.0, "assistant": 0.0})
    voices: set[str] = field(default_factory=set)

    def add(self, line: dict[str, Any]) -> None:
        self.dialogues += 1
        self.turns += len(line["turns"]) // 2
        self.voices.add(line["voice"])
        for turn in line["turns"]:
            self.seconds[turn["role"]] += turn.get("seconds", 0)  # a reply may be text alone


def write_manifests(results: Results, out: Path) -> None:
    """Write the manifests that have dialogues, and print what they hold."""
    counts = {}
    for place in PLACES:
        counts[place] = Count()

        def line_of(value: dict[str, Any], place: str = place) -> dict[str, Any] | None:
            if value["place"] != place:
                return None
            counts[place].add(value["line"])
            return value["line"]

        write_lines(results, out / f"{place}.jsonl", line_of)
    console.print(table(counts))


def write_lines(
    results: Results, path: Path, line_of: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> None:
    """Write a line for each value for which `line_of` gives one; without any, no file."""
    lines = (line for one in results.accepted() if (line := line_of(one.value)) is not None)
    first = next(lines, None)
    if first is None:
        return
    with files.atomic_write(path) as file:
        for line in itertools.chain([first], lines):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_left_out(results: Results, path: Path) -> None:
    """Write what was refused, by name and with its reason."""
    with files.atomic_write(path) as file:
        for one in results:
            if one.reason is not None:
                left_out = {"id": one.key, "reason": one.reason, "message": one.message}
                file.write(json.dumps(left_out, ensure_ascii=False) + "\n")
    if results.refused:
        say(f"{path} names all that were refused")


def table(counts: dict[str, Count]) -> rich.table.Table:
    """What each manifest holds."""
    shown = rich.table.Table("", "dialogues", "turns", "questions", "replies", "voices")
    for place, count in counts.items():
        spoken = [f"{count.seconds[role] / 60:,.1f} min" for role in ("user", "assistant")]
        numbers = (f"{count.dialogues:,}", f"{count.turns:,}")
        shown.add_row(place, *numbers, *spoken, str(len(count.voices)))
    return shown

"""What `omni2 synthesize dialogues` does with a grammar."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import rich.progress
import rich.table

from omni2_jax import files
from omni2_jax.console import console, progress_bar, say
from omni2_jax.synthesize.grammar import Grammar
from omni2_jax.synthesize.grammar_file import read_grammar
from omni2_jax.synthesize.records import SPLITS, TextDialogue
from omni2_jax.synthesize.sampling import Sampler, sentences


def from_grammar(
    path: Path, count: int, held_out: int, max_turns: int | None, seed: int, out: Path
) -> None:
    """Write `count` dialogues of the split "seen", and `held_out` of each other split, to `out`.

    Raises ValueError if the grammar has a fault or too few dialogues, or if `out` exists and holds
    anything else.
    """
    grammar = limited(read_grammar(path), max_turns)
    wanted = {split: count if split == "seen" else held_out for split in SPLITS}
    made: list[TextDialogue] = []
    with progress_bar(rich.progress.MofNCompleteColumn()) as bar:
        task = bar.add_task("dialogues", total=sum(wanted.values()))
        for dialogue in Sampler(grammar, wanted, seed):
            made.append(dialogue)
            bar.advance(task)
    write_lines(out, [dialogue.to_json() for dialogue in made])
    console.print(table(made))


def write_sentences(
    path: Path, kind: str, count: int, max_turns: int | None, seed: int, out: Path | None
) -> None:
    """Write `count` distinct questions, replies or both, one a line, to `out` or to stdout.

    Raises ValueError as `from_grammar`.
    """
    grammar = limited(read_grammar(path), max_turns)
    lines = list(sentences(grammar, kind, count, seed))
    if out is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    else:
        write_lines(out, lines)


def limited(grammar: Grammar, max_turns: int | None) -> Grammar:
    """The grammar without dialogues of more than `max_turns` turns."""
    turns = grammar.turns[:max_turns]
    if not any(turns):
        raise ValueError(f"the grammar makes no dialogues of {max_turns} turns or less")
    return dataclasses.replace(grammar, turns=turns)


def write_lines(out: Path, lines: Iterable[str]) -> None:
    """Write a text file. Raises ValueError if `out` exists and holds another text."""
    text = "".join(f"{line}\n" for line in lines)
    if out.exists():
        if not out.is_file() or out.read_bytes() != text.encode():
            raise ValueError(f"{out} exists, and this command makes another one; give a new file")
        say(f"{out} exists already, with the same content.")
        return
    with files.atomic_write(out) as file:
        file.write(text)


def table(dialogues: Iterable[TextDialogue]) -> rich.table.Table:
    """How many dialogues there are of each topic and split."""
    counts: dict[str, dict[str, int]] = {}
    for dialogue in dialogues:
        splits = counts.setdefault(dialogue.topic, dict.fromkeys(SPLITS, 0))
        splits[dialogue.split] += 1
    shown = rich.table.Table("topic", *SPLITS)
    for topic, splits in sorted(counts.items()):
        shown.add_row(topic, *map(str, splits.values()))
    shown.add_section()
    sums = [sum(splits[split] for splits in counts.values()) for split in SPLITS]
    shown.add_row("all", *map(str, sums))
    return shown

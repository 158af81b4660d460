"""Reads a grammar of dialogues from YAML.

    turns: [0.7, 0.3]         # weights of dialogues of one turn, of two turns, ...
    new_topic: 0.2            # the share of later turns that begin another topic
    held_out: {phrasings: 0.15, values: 0.06, seed: 0}
    include: [animals.yaml]   # more files with tables, topics and follow_ups
    tables:
      places:
        columns: [country, capital]
        rows:
          - [France, Paris]
          - [Spain, Madrid]
    topics:                   # each makes the first turn of dialogues
      plus:
        slots: {a: 0..100, b: 0..100}
        where: a + b <= 100
        let: {c: a + b}
        key: <[a, b]|sort|join("+")>
        questions:
          - What is <a> plus <b>?
          - What do you get if you add <a> and <b>?
        replies: <a> plus <b> is <c>.
        answers: is <c>
        follow_ups: [minus]
      capital:
        slots: {place: places}
        questions: What is the capital of <place.country>?
        replies: The capital of <place.country> is <place.capital>.
    follow_ups:               # each goes on from a turn that names it
      minus:
        slots: {b: 1..20}
        where: b <= previous.c
        let: {c: previous.c - b}
        questions: And minus <b>?
        replies: <previous.c> minus <b> is <c>.

slots       names and what they take: integers FIRST..LAST, a list of texts or integers, or a table,
            whose columns are then written <slot.column>
where       which combinations of values are used; without it, all
let         names that are computed, one after the other
questions   the phrasings: one or several templates. A share of them (held_out.phrasings) is only
            for the evaluation
replies     one or several templates; of several, the question's text decides which one it is
answers     what a right reply contains, as whole words; without it, the whole reply
key         the values that are held out together: a share (held_out.values) of all different keys
            is only for the evaluation. Without it, no values of this topic are held out, which is
            right for facts that do not follow from one another
follow_ups  the names of follow-ups that may come next. A follow-up keeps the names of the turn
            before it; those that it changes are called previous.NAME, and there are
            previous.question and previous.reply
weight      how often a topic is drawn, or a follow-up among those that may come next (1)
copies      how many dialogues with the same text are distinct (1); for an empty question, which is
            spoken differently each time

Templates and their filters are described in `templates`.
"""

import functools
import re
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from omni2_jax.files import short
from omni2_jax.synthesize.grammar import Grammar, HeldOut, Rule, digest
from omni2_jax.synthesize.grammar_check import check_grammar
from omni2_jax.synthesize.located_yaml import LocatedYaml
from omni2_jax.synthesize.templates import Expression, Template

RANGE = re.compile(r"(-?\d{1,6})\.\.(-?\d{1,6})")
NAME = re.compile(r"[a-z][a-z0-9_]*")

OneOrMany = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
Share = Annotated[float, Field(ge=0, le=0.9)]


class Entry(BaseModel):
    """A mapping of the file, which has exactly these names and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TableEntry(Entry):
    columns: Annotated[list[str], Field(min_length=1)]
    rows: Annotated[list[list[Any]], Field(min_length=1)]


class RuleEntry(Entry):
    slots: dict[str, Any] = {}
    where: str | None = None
    let: dict[str, str] = {}
    questions: OneOrMany
    replies: OneOrMany
    answers: OneOrMany | None = None
    key: str | None = None
    follow_ups: list[str] = []
    weight: Annotated[float, Field(gt=0)] = 1.0
    copies: Annotated[int, Field(ge=1, le=10**6)] = 1


class HeldOutEntry(Entry):
    phrasings: Share = 0.0
    values: Share = 0.0
    seed: int = 0


class PartEntry(Entry):
    """The content of a file that another one includes."""

    tables: dict[str, TableEntry] = {}
    topics: dict[str, RuleEntry] = {}
    follow_ups: dict[str, RuleEntry] = {}


class FileEntry(PartEntry):
    turns: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1, max_length=20)] = [1]
    new_topic: Annotated[float, Field(ge=0, le=1)] = 0.0
    held_out: HeldOutEntry = HeldOutEntry()
    include: list[str] = []


def read_grammar(path: Path) -> Grammar:
    """The grammar in a YAML file, in the format above.

    Every rule is tried once. Raises ValueError, one line that begins with FILE:LINE:COLUMN, for
    the first fault.
    """
    main = LocatedYaml(path)
    entry = main.validated(FileEntry)
    parts: list[tuple[LocatedYaml, PartEntry]] = [(main, entry)]
    for number, name in enumerate(entry.include):
        if not (path.parent / name).is_file():
            raise ValueError(f"{main.place('include', number)}: there is no file {name!r}")
        part = LocatedYaml(path.parent / name)
        parts.append((part, part.validated(PartEntry)))
    if not any(entry.turns):
        raise ValueError(f"{main.place('turns')}: all weights are 0")
    tables = read_tables(parts)
    topics = read_rules(parts, "topics", tables, entry.held_out)
    follow_ups = read_rules(parts, "follow_ups", tables, entry.held_out)
    if not topics:
        raise ValueError(f"{path}: it has no topics")
    held_out = HeldOut(**entry.held_out.model_dump())
    grammar = Grammar(topics, follow_ups, tuple(entry.turns), entry.new_topic, held_out)
    check_grammar(grammar)
    return grammar


def read_tables(parts: Iterable[tuple[LocatedYaml, PartEntry]]) -> dict[str, list[Any]]:
    """{name of a table: its rows, tuples with named fields}."""
    tables: dict[str, list[Any]] = {}
    for file, part in parts:
        for name, entry in part.tables.items():
            if name in tables:
                raise ValueError(f"{file.place('tables', name)}: table {name!r} comes twice")
            for number, column in enumerate(entry.columns):
                if not NAME.fullmatch(column) or column in entry.columns[:number]:
                    place = file.place("tables", name, "columns", number)
                    raise ValueError(f"{place}: {column!r} cannot be the name of a column")
            row_type = namedtuple("Row", entry.columns)  # pyright: ignore
            for number, row in enumerate(entry.rows):
                place = file.place("tables", name, "rows", number)
                if len(row) != len(entry.columns):
                    raise ValueError(
                        f"{place}: the row has {len(row)} values, the table has "
                        f"{len(entry.columns)} columns"
                    )
                check_values(row, place)
            tables[name] = [row_type(*row) for row in entry.rows]
    return tables


def check_values(values: Sequence[object], place: str) -> None:
    """Raises ValueError if one of the values is neither text nor an integer."""
    for value in values:
        if not isinstance(value, str | int) or isinstance(value, bool):
            # YAML reads No, On and 1.5 as other types than text.
            raise ValueError(f"{place}: {value!r} is neither text nor an integer; put it in quotes")


def read_rules(
    parts: Iterable[tuple[LocatedYaml, PartEntry]],
    section: str,
    tables: Mapping[str, list[Any]],
    held_out: HeldOutEntry,
) -> dict[str, Rule]:
    """The rules of a section, "topics" or "follow_ups", of all files."""
    rules: dict[str, Rule] = {}
    for file, part in parts:
        for name, entry in getattr(part, section).items():
            place = functools.partial(file.place, section, name)
            if name in rules:
                raise ValueError(f"{place()}: {name!r} comes twice in {section}")
            if not NAME.fullmatch(name):
                raise ValueError(f"{place()}: {name!r} is no name of small letters, digits and _")
            rules[name] = read_rule(name, entry, place, tables, held_out)
    return rules


def read_rule(
    name: str,
    entry: RuleEntry,
    place: Any,  # keys below the rule's own -> FILE:LINE:COLUMN
    tables: Mapping[str, list[Any]],
    held_out: HeldOutEntry,
) -> Rule:
    def templates(key: str, sources: list[str] | None) -> list[Template]:
        return [Template(text, place(key, i)) for i, text in enumerate(sources or [])]

    questions = templates("questions", entry.questions)
    for number, question in enumerate(entry.questions):
        if question in entry.questions[:number]:
            raise ValueError(f"{questions[number].place}: this question comes twice")
    # Which phrasings are held out depends on the phrasings alone, not on their order.
    questions.sort(key=lambda question: digest(f"{held_out.seed} {question.source}"))
    return Rule(
        name=name,
        place=place(),
        slots={
            slot: slot_values(v, place("slots", slot), tables) for slot, v in entry.slots.items()
        },
        where=None if entry.where is None else Expression(entry.where, place("where")),
        let={key: Expression(text, place("let", key)) for key, text in entry.let.items()},
        questions=tuple(questions),
        held_out=held_out_count(len(questions), held_out.phrasings),
        replies=tuple(templates("replies", entry.replies)),
        answers=tuple(templates("answers", entry.answers)),
        key=None if entry.key is None else Template(entry.key, place("key")),
        follow_ups=tuple(entry.follow_ups),
        weight=entry.weight,
        copies=entry.copies,
    )


def held_out_count(phrasings: int, share: float) -> int:
    """How many phrasings of a rule are held out: at least one, if there are four or more."""
    return max(round(phrasings * share), int(phrasings >= 4 and share > 0))


def slot_values(value: Any, place: str, tables: Mapping[str, list[Any]]) -> Sequence[Any]:
    """The values that a slot takes. Raises ValueError if there are none."""
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{place}: the slot has no values")
        check_values(value, place)
        return value
    bounds = RANGE.fullmatch(value) if isinstance(value, str) else None
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise ValueError(f"{place}: the slot has no values, {first} is more than {last}")
        return range(first, last + 1)
    if value not in tables:
        raise ValueError(
            f"{place}: {short(value)} is neither a table, a list nor integers FIRST..LAST"
        )
    return tables[value]

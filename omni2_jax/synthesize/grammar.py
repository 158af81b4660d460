"""A grammar of dialogues: rules that make a turn each, and how turns follow one another.

`grammar_file` reads one from YAML and describes the format; `sampling` makes dialogues with it.
"""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni2_jax.synthesize.records import TextDialogue, TextTurn
from omni2_jax.synthesize.templates import Expression, Template

Scope = dict[str, Any]  # the values that a template can name

TRIES = 1000  # random values that are drawn for a rule until its condition holds


@dataclass(frozen=True)
class HeldOut:
    """Shares that only the evaluation sees: of each rule's phrasings, and of its values.

    seed: another one holds out others. It is a part of the grammar, so that data sets that were
    sampled with different seeds agree on what is held out.
    """

    phrasings: float = 0.0
    values: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Rule:
    """Makes one turn: a topic begins a dialogue, a follow-up goes on from the turn before.

    slots: names and the values that each of them takes. where: which combinations are used.
    let: names that are computed. questions: the phrasings; the first `held_out` of them are for
    the evaluation. key: says which values are the same for the held-out share; None: no value of
    this rule is held out. follow_ups: the rules that may come next. copies: how many dialogues
    with the same text are distinct.
    """

    name: str
    place: str
    slots: Mapping[str, Sequence[Any]]
    where: Expression | None
    let: Mapping[str, Expression]
    questions: tuple[Template, ...]
    held_out: int
    replies: tuple[Template, ...]
    answers: tuple[Template, ...]
    key: Template | None
    follow_ups: tuple[str, ...]
    weight: float = 1.0
    copies: int = 1

    @property
    def combinations(self) -> int:
        """The number of combinations of its slots' values, those that `where` refuses included.

        Only tests use it, to choose rules that are small enough to try all of them.
        """
        return math.prod(len(values) for values in self.slots.values())

    def scopes(self, before: Scope) -> Iterator[Scope]:
        """What the rule's templates can name, for every combination of values, in order."""
        for values in itertools.product(*self.slots.values()):
            scope = self.scope(before, values)
            if scope is not None:
                yield scope

    def draw(self, before: Scope, rng: random.Random) -> Scope | None:
        """As `scopes`, for random values; None if no values that fit were found."""
        for _ in range(TRIES if self.slots else 1):
            scope = self.scope(before, [rng.choice(values) for values in self.slots.values()])
            if scope is not None:
                return scope
        return None

    def scope(self, before: Scope, values: Sequence[Any]) -> Scope | None:
        """The names after a turn with these values of the slots; None if `where` refuses them."""
        scope = {**before, **dict(zip(self.slots, values, strict=True))}
        if self.where is not None and not self.where.value(scope):
            return None
        for name, expression in self.let.items():
            scope[name] = expression.value(scope)
        return scope

    def turn(self, scope: Scope, phrasing: int) -> TextTurn:
        """The turn that asks with the phrasing of this index. A question has always one reply."""
        question = self.questions[phrasing].sentence(scope)
        reply = self.replies[pick(question, len(self.replies))].sentence(scope)
        answers = [answer.fill(scope) for answer in self.answers]
        return TextTurn(question, reply, answers or self.all_replies(scope), self.name)

    def all_replies(self, scope: Scope) -> list[str]:
        return list(dict.fromkeys(reply.sentence(scope) for reply in self.replies))


@dataclass(frozen=True)
class Grammar:
    """Rules, and how dialogues are made of them.

    topics, follow_ups: the rules by their names. turns: weights of dialogues of 1, 2, ... turns.
    new_topic: the share of later turns that begin another topic instead of following up.
    """

    topics: Mapping[str, Rule]
    follow_ups: Mapping[str, Rule]
    turns: tuple[float, ...]
    new_topic: float
    held_out: HeldOut

    @functools.cached_property
    def weights(self) -> list[float]:
        return list(itertools.accumulate(rule.weight for rule in self.topics.values()))

    def draw(self, rng: random.Random) -> "Draft | None":
        """A random dialogue, its texts not yet filled in; None if none was found this time."""
        length = rng.choices(range(1, len(self.turns) + 1), self.turns)[0]
        draft = Draft(self, ())
        while draft is not None and len(draft.steps) < length:
            draft = draft.extended(self.next_rule(draft, rng), rng)
        return draft

    def next_rule(self, draft: "Draft", rng: random.Random) -> Rule:
        """A random rule for the next turn."""
        choices = draft.follow_ups()
        if draft.steps and choices and rng.random() >= self.new_topic:
            return rng.choices(choices, [rule.weight for rule in choices])[0]
        return rng.choices(list(self.topics.values()), cum_weights=self.weights)[0]

    def next_rules(self, draft: "Draft") -> list[Rule]:
        """All rules that the next turn may come from."""
        topics = list(self.topics.values())
        if not draft.steps:
            return topics
        choices = draft.follow_ups()
        return choices + (topics if self.new_topic > 0 or not choices else [])

    def all_drafts(self, length: int) -> "Iterator[Draft]":
        """Every dialogue of `length` turns, in order."""
        drafts: Iterator[Draft] = iter([Draft(self, ())])
        for _ in range(length):
            drafts = itertools.chain.from_iterable(map(Draft.extensions, drafts))
        return drafts

    def lacks(self, split: str) -> str | None:
        """Why there are no dialogues of a split; None if there may be some."""
        rules = [*self.topics.values(), *self.follow_ups.values()]
        if split in ("unseen_phrasing", "unseen_both") and not any(rule.held_out for rule in rules):
            return "it holds out no phrasings"
        has_keys = self.held_out.values > 0 and any(rule.key for rule in rules)
        if split in ("unseen_values", "unseen_both") and not has_keys:
            return "it holds out no values"
        return None

    def holds_out(self, key: str) -> bool:
        """True if values with this key are only for the evaluation."""
        return share(f"{self.held_out.seed} {key}") < self.held_out.values


@dataclass(frozen=True)
class Step:
    """One turn of a draft: its rule, the index of its phrasing, and the names after it."""

    rule: Rule
    phrasing: int
    scope: Scope


@dataclass(frozen=True)
class Draft:
    """A dialogue whose rules, phrasings and values are chosen. copy: see `Rule.copies`."""

    grammar: Grammar
    steps: tuple[Step, ...]
    copy: int = 0

    def follow_ups(self) -> list[Rule]:
        """The follow-ups of the last turn."""
        names = self.steps[-1].rule.follow_ups if self.steps else ()
        return [self.grammar.follow_ups[name] for name in names]

    def before(self, rule: Rule) -> Scope:
        """The names that the next turn begins with. A topic begins with none."""
        if not self.steps or rule.name in self.grammar.topics:
            return {}
        last = self.steps[-1]
        turn = last.rule.turn(last.scope, last.phrasing)
        previous = {**last.scope, "question": turn.question, "reply": turn.reply}
        return {**last.scope, "previous": previous}

    def extended(self, rule: Rule, rng: random.Random) -> "Draft | None":
        """The draft with one more turn of `rule`, of a random phrasing and random values."""
        scope = rule.draw(self.before(rule), rng)
        if scope is None:
            return None
        step = Step(rule, rng.randrange(len(rule.questions)), scope)
        copy = self.copy if self.steps else rng.randrange(rule.copies)
        return Draft(self.grammar, (*self.steps, step), copy)

    def extensions(self) -> "Iterator[Draft]":
        """The draft with one more turn, in every way there is."""
        for rule in self.grammar.next_rules(self):
            for scope in rule.scopes(self.before(rule)):
                for phrasing in range(len(rule.questions)):
                    steps = (*self.steps, Step(rule, phrasing, scope))
                    for copy in [self.copy] if self.steps else range(rule.copies):
                        yield Draft(self.grammar, steps, copy)

    def split(self) -> str:
        """The split that the dialogue belongs to, see `records`."""
        phrasing = any(step.phrasing < step.rule.held_out for step in self.steps)
        values = any(
            step.rule.key is not None and self.grammar.holds_out(step.rule.key.fill(step.scope))
            for step in self.steps
        )
        if phrasing and values:
            return "unseen_both"
        return "unseen_phrasing" if phrasing else "unseen_values" if values else "seen"

    def dialogue(self) -> TextDialogue:
        """The dialogue with its texts. Its id follows from them."""
        turns = [step.rule.turn(step.scope, step.phrasing) for step in self.steps]
        text = "\n".join([*(turn.question for turn in turns), str(self.copy)])
        topic = self.steps[0].rule.name
        return TextDialogue(f"{topic}-{digest(text)[:16]}", self.split(), topic, turns)


def digest(text: str) -> str:
    """A hash of a text that is the same in every process and version, in hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def share(text: str) -> float:
    """A number in [0, 1) that follows from a text."""
    return int(digest(text), 16) / 16**32


def pick(text: str, count: int) -> int:
    """A number from 0 to count - 1 that follows from a text."""
    return int(share(text) * count)

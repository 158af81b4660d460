"""The phrasings of Nano's grammar: one that is held out can be understood from those that stay.

The measure is the overlap of words and of pairs of words that follow one another. What few rules
use counts more than what many use. A slot is a word: what fills it in, and where among the slots.
"""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from omni2_jax.synthesize.grammar import Grammar, Rule
from omni2_jax.synthesize.grammar_file import read_grammar
from omni2_jax.synthesize.templates import Template
from tests.support.paths import ROOT

FEWEST = 12  # phrasings of a rule
LEAST_OVERLAP = 0.15  # of a phrasing with the nearest one of the same meaning
TELLING = 3  # phrasings of a rule have a telling word, so that two do if one is held out


@pytest.fixture(scope="module")
def nano() -> Grammar:
    return read_grammar(ROOT / "recipes" / "nano" / "grammar.yaml")


def all_rules(grammar: Grammar) -> dict[str, Rule]:
    return {
        name: rule
        for name, rule in {**grammar.topics, **grammar.follow_ups}.items()
        if any(question.source for question in rule.questions)
    }


def features(rule: Rule, question: Template) -> set[str]:
    """The words of a phrasing, and its pairs of words."""

    places = itertools.count(1)

    def slot(found: re.Match[str]) -> str:
        values = rule.slots.get(found[1], range(0))  # other names are computed, and are numbers
        kind = "number" if isinstance(values, range) else f"values{id(values)}"
        return f" {kind}at{next(places)} "

    text = re.sub(r"<(\w+)[^>]*>", slot, question.source).lower().replace("what's", "what is")
    words = re.findall(r"[a-z0-9']+", text)
    return {*words, *zip(["^", *words], [*words, "$"], strict=True)}  # pyright: ignore


def meaning(rule: Rule) -> tuple[str, ...]:
    """What a reply must contain. Rules for which it is the same need not be told apart."""
    return tuple(template.source for template in rule.answers or rule.replies)


def met_with(grammar: Grammar, rule: Rule) -> set[str]:
    """The rules that may be drawn where this one may be."""
    met = {rule.name, *grammar.topics}
    for other in all_rules(grammar).values():
        if rule.name in other.follow_ups:
            met |= set(other.follow_ups)
    return met


def overlaps(sets: list[set[str]], owners: list[str]) -> np.ndarray:
    """[N, N]: the weight of what two phrasings share, over the weight of what either has."""
    names = sorted({feature for one in sets for feature in one}, key=str)
    index = {feature: number for number, feature in enumerate(names)}
    used = np.zeros((len(sets), len(names)), np.float32)
    for row, one in zip(used, sets, strict=True):
        row[[index[feature] for feature in one]] = 1
    rules = {owner: np.flatnonzero([other == owner for other in owners]) for owner in set(owners)}
    uses = sum(used[rows].any(0) for rows in rules.values())
    weights = np.log(len(rules) / uses) + 0.05
    shared = (used * weights) @ used.T
    alone = np.diag(shared)
    return shared / (alone[:, None] + alone[None] - shared)


def telling(own: list[set[str]], others: list[set[str]]) -> set[str]:
    """The words that several phrasings of one rule have, and none of the other rule."""
    counts = Counter(word for one in own for word in one if isinstance(word, str))
    used = set().union(*others)
    return {word for word, count in counts.items() if count >= TELLING and word not in used}


def misleading(grammar: Grammar) -> list[str]:
    """The phrasings that are nearer to one of another meaning than to any of their own.

    Unless a telling word is in one of the two: "Count down from ten to two." is near to "Count from
    two to ten.", but "down" is known from others. Rules that share a phrasing are told apart by the
    values in it, or by the turn before: "What is <a> plus <b>?" has an answer if the sum is at most
    a hundred. Questions outside of the world are of all kinds, and need not resemble one another.
    """
    rules = all_rules(grammar)
    entries = [(rule, question) for rule in rules.values() for question in rule.questions]
    owners = np.array([rule.name for rule, _ in entries])
    sets = [features(rule, question) for rule, question in entries]
    overlap = overlaps(sets, list(owners))
    np.fill_diagonal(overlap, -1)
    of_rule = {name: [sets[i] for i in np.flatnonzero(owners == name)] for name in rules}
    found = []
    for name, rule in rules.items():
        if name.startswith("outside"):
            continue
        met = met_with(grammar, rule) & rules.keys()
        same = [other for other in met if meaning(rules[other]) == meaning(rule)]
        shared = [other for other in met if any(one in of_rule[name] for one in of_rule[other])]
        kin, others = np.isin(owners, same), np.isin(owners, list(met - {*same, *shared}))
        for number in np.flatnonzero(owners == name):
            near = overlap[number, kin].max()
            line = f"{name}: {entries[number][1].source} ({near:.2f})"
            if near < LEAST_OVERLAP:
                found.append(line)
            for stranger in np.flatnonzero(others & (overlap[number] >= near)):
                rival = of_rule[owners[stranger]]
                if not (
                    sets[number] & telling(of_rule[name], rival)
                    or sets[stranger] & telling(rival, of_rule[name])
                ):
                    rule_, question = entries[stranger]
                    found.append(f"{line} and {rule_.name}: {question.source}")
    return found


def test_a_phrasing_is_nearest_to_another_of_its_meaning(nano):
    assert misleading(nano) == []


def test_every_rule_of_nano_has_many_phrasings(nano):
    counts = {name: len(rule.questions) for name, rule in all_rules(nano).items()}
    assert {name: count for name, count in counts.items() if count < FEWEST} == {}


FAULTY = """\
topics:
  sum:
    slots: {a: 1..9, b: 1..9}
    questions: ["What is <a> plus <b>?", "Tell me <a> plus <b>.", "How much is <a> plus <b>?"]
    replies: It is <a + b>.
    follow_ups: [again]
  night:
    questions: ["Good night.", "Good night, Nano.", "Good night, please."]
    replies: Sleep well.
follow_ups:
  again:
    questions: [Say that again., "Say that again, please.", "Once more, please."]
    replies: <previous.reply>
"""


def test_a_phrasing_that_resembles_another_meaning_is_found(tmp_path):
    path = tmp_path / "grammar.yaml"
    path.write_text(FAULTY)
    found = misleading(read_grammar(path))
    assert any(line.startswith("again: Once more, please.") for line in found)
    assert not any(line.startswith(("sum", "night: Good night.")) for line in found)


def test_facts_are_not_held_out_and_what_follows_from_others_is(nano):
    facts = ("times", "divided", "twice", "half", "capital", "opposite", "plural", "day_after")
    assert all(nano.topics[name].key is None for name in facts)
    computed = ("plus", "minus", "larger", "is_less", "is_odd", "count_down", "number_before")
    assert all(nano.topics[name].key is not None for name in computed)

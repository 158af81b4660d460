"""Dialogues from a grammar: what templates fill in, splits, distinct texts, faults of the file."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from omni2_jax.synthesize import make_dialogues, sampling, templates
from omni2_jax.synthesize.grammar import Grammar, Rule
from omni2_jax.synthesize.grammar_file import read_grammar
from omni2_jax.synthesize.records import TextDialogue, read_dialogues
from omni2_jax.synthesize.sampling import Sampler, sentences
from tests.support.paths import ROOT

NANO = ROOT / "recipes" / "nano" / "grammar.yaml"

SUMS = """\
turns: [1, 1]
held_out: {phrasings: 0.25, values: 0.2}
tables:
  places:
    columns: [country, capital]
    rows:
      - [France, Paris]
      - [Spain, Madrid]
      - [Italy, Rome]
topics:
  plus:
    slots: {a: 0..9, b: 0..9}
    where: a >= b
    let: {c: a + b}
    key: <a>+<b>
    questions:
      - What is <a> plus <b>?
      - Add <a> and <b>.
      - How much is <a> plus <b>?
      - <a> plus <b>?
    replies: <a> plus <b> is <c>.
    answers: is <c>
    follow_ups: [minus]
  capital:
    slots: {place: places}
    questions: The capital of <place.country>?
    replies:
      - It is <place.capital>.
      - <place.capital> is the capital.
follow_ups:
  minus:
    slots: {b: 1..5}
    where: b <= previous.c
    let: {c: previous.c - b}
    questions: And minus <b>?
    replies: <previous.c> minus <b> is <c>.
    follow_ups: [minus]
"""


@pytest.fixture
def grammar_file(tmp_path):
    """Write a grammar -> its path."""

    def write(text: str = SUMS) -> Path:
        path = tmp_path / "grammar.yaml"
        path.write_text(text)
        return path

    return write


def sample(grammar: Grammar, seed: int = 0, **wanted: int) -> list[TextDialogue]:
    return list(Sampler(grammar, wanted, seed))


def test_numbers_are_words_and_follow_ups_go_on_from_the_turn_before(grammar_file):
    dialogues = sample(read_grammar(grammar_file()), seen=150)
    numbers = {templates.words(number): number for number in range(19)}
    followed = 0
    for dialogue in dialogues:
        for before, turn in zip([None, *dialogue.turns], dialogue.turns, strict=False):
            sum_ = re.fullmatch(r"(\w+) (plus|minus) (\w+) is (\w+)\.", turn.reply)
            if sum_ is None or not {sum_[1].lower(), sum_[3], sum_[4]} <= set(numbers):
                continue
            assert turn.reply[0].isupper() and turn.question[0].isupper()
            a, b, c = (numbers[sum_[i].lower()] for i in (1, 3, 4))
            assert c == (a + b if sum_[2] == "plus" else a - b)
            if turn.topic == "minus":
                assert before is not None and before.reply.lower().endswith(f" {sum_[1].lower()}.")
                followed += 1
            else:
                assert turn.answers == [f"is {sum_[4]}"] and a >= b
    assert followed > 20


def test_dialogues_are_distinct_and_follow_from_the_seed(grammar_file):
    grammar = read_grammar(grammar_file())
    first, again, other = (
        sample(grammar, 0, seen=200),
        sample(grammar, 0, seen=200),
        sample(grammar, 1, seen=200),
    )
    assert first == again != other
    assert len({dialogue.questions for dialogue in first}) == 200
    assert len({dialogue.id for dialogue in first}) == 200


def test_a_question_has_always_the_same_reply(grammar_file):
    replies: dict[str, set[str]] = {}
    for dialogue in sample(read_grammar(grammar_file()), seen=300):
        first = dialogue.turns[0]
        replies.setdefault(first.question, set()).add(first.reply)
        assert first.topic != "capital" or len(first.answers) == 2
    assert {len(texts) for texts in replies.values()} == {1}
    assert any(reply.startswith("It is") for texts in replies.values() for reply in texts)


def test_held_out_phrasings_and_values_never_occur_in_training(grammar_file):
    """What is held out does not depend on the seed that dialogues are sampled with."""
    grammar = read_grammar(grammar_file())
    seen = sample(grammar, 0, seen=150)
    held = sample(grammar, 5, unseen_phrasing=20, unseen_values=20, unseen_both=8)
    assert Counter(d.split for d in held) == {
        "unseen_phrasing": 20,
        "unseen_values": 20,
        "unseen_both": 8,
    }

    def phrasing(question: str) -> str:
        return re.sub(
            r"\b(zero|one|two|three|four|five|six|seven|eight|nine)\b", "N", question.lower()
        )

    def values(reply: str) -> str | None:
        return reply if " plus " in reply else None

    phrasings = {phrasing(d.turns[0].question) for d in seen if d.topic == "plus"}
    sums = {values(d.turns[0].reply) for d in seen} - {None}
    assert len(phrasings) == 3  # of four, one is held out
    for dialogue in held:
        turn = dialogue.turns[0]
        if turn.topic == "capital":  # held out is the sum that follows
            continue
        assert (phrasing(turn.question) in phrasings) == (dialogue.split == "unseen_values")
        assert (values(turn.reply) in sums) <= (dialogue.split == "unseen_phrasing")


def test_all_dialogues_that_exist_are_found_and_one_more_is_refused(grammar_file, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_FAILURES", 300)
    text = SUMS.replace("[1, 1]", "[1]").replace("0.25", "0").replace("0.2", "0")
    grammar = read_grammar(grammar_file(text))
    exist = 55 * 4 + 3  # sums with a >= b, four phrasings; capitals
    assert len(sample(grammar, seen=exist)) == exist
    with pytest.raises(ValueError, match=rf"has {exist} dialogues of the split seen, {exist + 1} "):
        sample(grammar, seen=exist + 1)
    for split, kind in (("unseen_phrasing", "phrasings"), ("unseen_values", "values")):
        with pytest.raises(ValueError, match=f"no dialogues of the split {split}: .* no {kind}"):
            sample(grammar, **{split: 1})
    replies = 55 + 3
    assert len(set(sentences(grammar, "replies", replies, 0))) == replies
    with pytest.raises(ValueError, match=rf"has {replies} distinct replies or few more; "):
        list(sentences(grammar, "replies", replies + 1, 0))


def test_copies_of_a_question_without_words(grammar_file):
    text = "topics:\n  silence:\n    questions: ''\n    copies: 3\n    replies: Nothing was said.\n"
    dialogues = sample(read_grammar(grammar_file(text)), seen=3)
    assert [d.questions for d in dialogues] == [("",)] * 3 and len({d.id for d in dialogues}) == 3


def test_the_command_writes_what_is_read_and_repeats_itself(grammar_file, tmp_path, capsys):
    path, out = grammar_file(), tmp_path / "out.jsonl"
    make_dialogues.from_grammar(path, 40, 5, None, 0, out)
    written = out.read_bytes()
    dialogues = list(read_dialogues(out))
    assert Counter(d.split for d in dialogues)["seen"] == 40 and len(dialogues) == 55
    assert json.loads(written.splitlines()[0])["turns"][0]["question"]
    make_dialogues.from_grammar(path, 40, 5, None, 0, out)
    with pytest.raises(ValueError, match="exists, and this command makes another one"):
        make_dialogues.from_grammar(path, 40, 5, None, 1, out)
    assert out.read_bytes() == written
    make_dialogues.write_sentences(path, "questions", 7, 1, 0, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 7 and all(line[0].isupper() for line in lines)


# What is replaced in SUMS, by what -> the text at whose place the fault is, and its message.
FAULTS = [
    ("{c: a + b}", "{c: a + q}", "a + q", "no slot 'q'; known are a, b"),
    ("{c: a + b}", "{c: a +}", "a +}", "unexpected 'end of template'"),
    ("<a> plus <b> is <c>.", "<a|word> plus <b>", "<a|word>", "No filter named 'word'"),
    ("<a> plus <b> is <c>.", "<a|plural> plus <b>", "<a|plural>", "expected a word, not int '"),
    ("<a> plus <b> is <c>.", "<''|article> <b>", "<''|article>", "expected a word, not str ''"),
    ("[Italy, Rome]", "[Italy, 2024-02-30]", "2024-02-30", "day is out of range for month"),
    ("Add <a> and <b>.", "Add <a and <b>.", "Add <a", "unexpected '<'"),
    ("<place.capital> is the", "<place.city> is the", "<place.city>", "no attribute 'city'"),
    ("<place.capital> is the", "<place.a|plural> is the", "<place.a|", "has no attribute 'a'"),
    ("[minus]\n  capital", "[divide]\n  capital", "plus:", "no follow-up 'divide'"),
    ("{a: 0..9,", "{a: [],", "[]", "the slot has no values"),
    ("{a: 0..9,", "{a: 9..0,", "9..0", "no values, 9 is more than 0"),
    ("{place: places}", "{place: towns}", "towns", "'towns' is neither a table"),
    ("[Italy, Rome]", "[Italy, No]", "[Italy", "False is neither text nor an integer"),
    ("[Italy, Rome]", "[Italy]", "[Italy", "the row has 1 values, the table has 2"),
    ("a >= b", "a > 90", "a > 90", "no values of plus meet its condition"),
    ("b <= previous.c", "b > 90", "b > 90", "no values of minus meet its condition"),
    ("a >= b", "a ** b", "a ** b", "** is not allowed"),
    ("- Add <a> and <b>.", "- <a> plus <b>?", "<a> plus <b>?", "this question comes twice"),
    ("where: a >= b", "were: a >= b", "a >= b", "topics.plus.were is not the name"),
    ("And minus <b>?", "[7]", "7]", "minus.questions.0 is 7"),
    ("  capital:\n", "  plus:\n", "plus:\n    slots: {place", "'plus' comes twice"),
    ("follow_ups:\n  minus", "follow_ups:\n  plus", "plus:", "'plus' is also a topic"),
    ("    follow_ups: [minus]\n", "", "minus:\n    slots", "minus comes after no rule"),
    ("key: <a>+<b>", "key: <a.x>+<b>", "<a.x>", "has no attribute 'x'"),
    ("turns: [1, 1]", "turns: [0, 0]", "[0, 0]", "all weights are 0"),
    ("turns: [1, 1]", "turns: [1, 1]]", "]\nheld", "expected"),
    ("turns: [1, 1]", "include: [none.yaml]", "none.yaml", "there is no file 'none.yaml'"),
]


@pytest.mark.parametrize(("old", "new", "where", "message"), FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_named_by_line_and_column(grammar_file, old, new, where, message):
    text = SUMS.replace(old, new)
    assert text != SUMS
    path = grammar_file(text)
    with pytest.raises(ValueError) as error:
        read_grammar(path)
    before = text[: text.rindex(where)]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    assert str(error.value).startswith(f"{path}:{line}:{column}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


# The world of Nano.


@pytest.fixture(scope="module")
def nano() -> Grammar:
    return read_grammar(NANO)


def rules(grammar: Grammar) -> list[Rule]:
    return [*grammar.topics.values(), *grammar.follow_ups.values()]


def test_the_world_of_nano_is_as_wide_as_stated(nano):
    inside = [name for name in nano.topics if not name.startswith("outside")]
    outside = [rule for name, rule in nano.topics.items() if name.startswith("outside")]
    assert len(inside) >= 34 and len(nano.follow_ups) >= 13
    assert sum(len(nano.topics[name].questions) for name in inside) >= 240
    assert sum(len(rule.questions) for rule in outside) >= 200
    assert all(
        0 < rule.held_out < len(rule.questions)
        for rule in rules(nano)
        if rule.name != "no_question"
    )
    assert len(nano.topics["capital"].slots["place"]) >= 40


def test_every_question_of_nano_has_one_reply(nano):
    """All first questions that are not about numbers: no two topics answer the same one."""
    replies: dict[str, dict[str, str]] = {}
    for rule in nano.topics.values():
        if rule.combinations > 100:
            continue
        for scope in rule.scopes({}):
            for phrasing in range(len(rule.questions)):
                turn = rule.turn(scope, phrasing)
                assert any(answer.lower() in turn.reply.lower() for answer in turn.answers)
                replies.setdefault(turn.question, {})[turn.reply] = rule.name
    assert len(replies) > 5000
    assert {question: found for question, found in replies.items() if len(found) > 1} == {}


def test_the_sums_of_nano_are_right(nano):
    numbers = {templates.words(number): number for number in range(101)}
    operations = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
        "divided by": lambda a, b: a / b,
    }
    checked = Counter()
    for topic in ("plus", "minus", "times", "divided"):
        for scope in nano.topics[topic].scopes({}):
            reply = nano.topics[topic].turn(scope, 0).reply.lower()
            parts = re.fullmatch(r"(.+) (plus|minus|times|divided by) (.+) is (.+)\.", reply)
            assert parts is not None
            a, b, c = (numbers[parts[i]] for i in (1, 3, 4))
            assert operations[parts[2]](a, b) == c
            checked[parts[2]] += 1
    assert checked["plus"] == checked["minus"] == 5151  # pairs whose sum is at most 100
    assert min(checked.values()) > 140


def test_the_texts_of_nano_are_fit_to_be_spoken(nano):
    for dialogue in sample(nano, seen=400, unseen_both=10):
        for turn in dialogue.turns:
            for text in [turn.question, turn.reply]:
                assert re.fullmatch(r"([A-Z][A-Za-z',.? -]*[.?])?", text), text
                assert "  " not in text
            assert 0 < len(turn.reply) < 120


def test_the_plurals_of_nano_are_those_of_inflect(nano):
    nouns = nano.topics["plural"].slots["noun"]
    wrong = [noun for noun in nouns if templates.plural(noun.name) != noun.plural]
    assert [noun.name for noun in wrong] == ["thief"]  # inflect: thiefs

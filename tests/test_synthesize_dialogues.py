"""Dialogues that a chat model writes: seeds, history, texts fit to be spoken, going on when killed.

The model is the stand-in of tests.support.endpoints.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from omni2_jax.endpoints import Endpoint, EndpointError
from omni2_jax.jobs import Where
from omni2_jax.synthesize import prompts, spoken
from omni2_jax.synthesize.dialogue_writer import WriterSettings, number_of_turns
from omni2_jax.synthesize.from_seeds import from_seeds
from omni2_jax.synthesize.records import read_dialogues
from omni2_jax.synthesize.seeds import read_seeds
from omni2_jax.synthesize.spoken import Limits
from tests.support.endpoints import CHAT, Standin, serve
from tests.support.paths import ROOT

COUNT = 12


def said_by_model(messages: list[dict]) -> str:
    """What the stand-in says: it follows from what it was asked, and repeats the history."""
    system, last = messages[0]["content"], messages[-1]["content"]
    if system.startswith(prompts.REWRITE[:30]):
        return f"Could you tell me this: {last}?"
    if system.startswith(prompts.NEXT_QUESTION[:30]):
        return f'"What else after {last.count("User:")}?"'
    if system.startswith(prompts.REPLY[:30]):
        return f"This is reply {len(messages)} to\n {last}"
    return "yes"


@pytest.fixture
def standin():
    with serve(reply=said_by_model) as server:
        yield server


@pytest.fixture
def seeds(tmp_path) -> Path:
    path = tmp_path / "seeds.txt"
    path.write_text("".join(f"fact {'abcdefghijkl'[i]}\n" for i in range(COUNT)))
    return path


def run(standin: Standin, seeds: Path, out: Path, count=None, workers=4, url="", **settings):
    endpoint = Endpoint(url or standin.url, "standin", retries=4, timeout=10)
    from_seeds([seeds], count, endpoint, WriterSettings(**settings), Where(workers), out)


def paid(standin: Standin) -> Counter[str]:
    """How often each text was asked for, without the trials."""
    bodies = [json.dumps(body["messages"]) for route, body in standin.requests if route == CHAT]
    return Counter(body for body in bodies if prompts.TRIAL not in body)


def last_messages(standin: Standin) -> list[str]:
    """The last message of everything that was asked for."""
    return [json.loads(body)[-1]["content"] for body in paid(standin)]


def test_turns_are_written_on_the_history(standin, seeds, tmp_path):
    run(standin, seeds, tmp_path / "out.jsonl", seed=3)
    dialogues = list(read_dialogues(tmp_path / "out.jsonl"))
    settings = WriterSettings(seed=3)
    lengths = [number_of_turns(f"seeds-{i:07d}", settings) for i in range(COUNT)]
    assert [len(dialogue.turns) for dialogue in dialogues] == lengths and len(set(lengths)) > 2
    assert [dialogue.id for dialogue in dialogues] == [f"seeds-{i:07d}" for i in range(COUNT)]
    for dialogue in dialogues:
        for number, turn in enumerate(dialogue.turns):
            # The system's message, two of each turn before, and the question.
            assert turn.reply == f"This is reply {2 + 2 * number} to {turn.question}"
            if number:
                assert turn.question == f"What else after {number}?"
            else:
                assert turn.question.startswith("Could you tell me this: fact ")
    assert sum(paid(standin).values()) == 2 * sum(lengths)


def test_the_number_of_turns_is_poisson_and_clipped():
    settings = WriterSettings(mean_turns=2, max_turns=5)
    counts = Counter(number_of_turns(f"s{i}", settings) for i in range(20_000))
    shares = {turns: count / 20_000 for turns, count in counts.items()}
    # exp(-2) 2^k / k!, with all of 0 at 1, and of 5 and more at 5
    expected = {1: 0.4060, 2: 0.2707, 3: 0.1804, 4: 0.0902, 5: 0.0527}
    assert shares == pytest.approx(expected, abs=0.01)


def test_the_same_bytes_with_any_workers_and_through_passing_faults(standin, seeds, tmp_path):
    run(standin, seeds, tmp_path / "a.jsonl", workers=1)
    standin.faults[CHAT] = [None, None, "429", "500", "cut", "malformed", "empty", "429"]
    run(standin, seeds, tmp_path / "b.jsonl", workers=5)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    run(standin, seeds, tmp_path / "c.jsonl", seed=1)
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_an_unfit_text_is_asked_for_again_and_refused_in_the_end(standin, seeds, tmp_path, capsys):
    def reply(messages):
        text = said_by_model(messages)
        first = len(messages) == 2
        if "fact a" in text and first:
            return "- one\n- two"  # asked for again
        if any("fact b?" in message["content"] for message in messages):
            return "See `print` of Python."  # always
        if text.startswith("Could") and "fact c" in text:
            return "SKIP."
        return "Cost: 5 $" if "What else after 1?" in messages[-1]["content"] else text

    standin.reply = reply
    run(standin, seeds, tmp_path / "out.jsonl")
    dialogues = {dialogue.id: dialogue for dialogue in read_dialogues(tmp_path / "out.jsonl")}
    assert set(dialogues) == {f"seeds-{i:07d}" for i in range(COUNT) if i not in (1, 2)}
    assert all(len(dialogue.turns) == 1 for dialogue in dialogues.values())
    assert last_messages(standin).count(prompts.AGAIN.format(fault="a list")) == 1
    asked = [body for body in paid(standin) if "fact b?" in body and prompts.REPLY[:30] in body]
    assert len(asked) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "10 dialogues; 2 refused: 1 x code (first: seeds-0000001: seeds-0000001 reply 0" in told
    assert "1 x not for speech (first: seeds-0000002: the model skips 'fact c')" in told
    early = sum(number_of_turns(key, WriterSettings()) > 1 for key in dialogues)
    assert f"10 turns; {early} dialogues end early" in told


def test_a_reply_that_is_too_long_is_asked_for_again(standin, seeds, tmp_path):
    standin.faults[CHAT] = [None, "long"]  # after the trial
    run(standin, seeds, tmp_path / "out.jsonl", count=1, max_turns=1)
    assert len(list(read_dialogues(tmp_path / "out.jsonl"))) == 1
    assert last_messages(standin).count(prompts.AGAIN.format(fault="too long")) == 1


def test_kill(standin, seeds, tmp_path):
    """After kill -9, the same command pays again only for what was in flight: one text a worker."""
    out, workers = tmp_path / "out.jsonl", 2
    command = ["synthesize", "dialogues", "--seeds", seeds, "--endpoint", standin.url]
    command += ["--model", "standin", "--out", out, "--workers", workers, "--mean-turns", 4]
    command = [sys.executable, "-m", "omni2_jax", *map(str, command)]
    standin.slow_seconds, standin.always[CHAT] = 0.05, "slow"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while standin.count(CHAT) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (answers,) = (tmp_path / "out.jsonl.work" / "answers").glob("*.jsonl")
    with open(answers, "ab") as file:
        file.write(b'["0123')  # a line that was being written
    standin.always.clear()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    asked = paid(standin)
    assert sum(asked.values()) - len(asked) <= workers
    with serve(reply=said_by_model) as other:
        run(other, seeds, tmp_path / "whole.jsonl", mean_turns=4)
        assert paid(other).keys() == asked.keys()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_more_seeds_go_on_and_other_settings_do_not(standin, seeds, tmp_path):
    out = tmp_path / "out.jsonl"
    run(standin, seeds, out, count=4)
    first = out.read_bytes()
    before = paid(standin)
    run(standin, seeds, out, count=4)
    assert out.read_bytes() == first and paid(standin) == before
    with pytest.raises(ValueError, match=r"was begun with temperature 0.8, not 0.1"):
        run(standin, seeds, out, count=4, temperature=0.1)
    run(standin, seeds, out, count=6)
    assert out.read_bytes().startswith(first) and max(paid(standin).values()) == 1


def test_what_is_refused_before_anything_is_written(standin, seeds, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    with pytest.raises(EndpointError, match="cannot be reached"):
        run(standin, seeds, out, url="http://127.0.0.1:9/v1")
    standin.always[CHAT] = "401"
    with pytest.raises(EndpointError, match="refuses the key"):
        run(standin, seeds, out)
    with pytest.raises(ValueError, match=r"nothing.txt: expected a file that ends in"):
        run(standin, tmp_path / "nothing.txt", out)
    seeds.write_text("")
    with pytest.raises(ValueError, match=r"seeds.txt is empty"):
        run(standin, seeds, out)
    seeds.write_text("a fact\n")
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    with pytest.raises(ValueError, match="exists, and was not made by this command"):
        run(standin, seeds, other)
    assert other.read_text() == "mine\n" and not list(out.parent.glob("*"))


SEEDS = {  # a file's name, its content -> the instructions
    ("alpaca.json", '[{"instruction": "Sort.", "input": "2, 1", "output": "1, 2"}]'): [
        "Sort.\n2, 1"
    ],
    ("alpaca.json", '[{"instruction": "Hi.", "input": "", "output": "Ho."}]'): ["Hi."],
    ("ultrachat.jsonl", '{"id": "0", "data": ["Why?", "So."]}\n{"data": ["How?"]}\n'): [
        "Why?",
        "How?",
    ],
    ("ultra.jsonl", '{"prompt": "Why?", "messages": [{"role": "user", "content": "Why?"}]}'): [
        "Why?"
    ],
    ("ultra.jsonl", '{"messages": [{"role": "user", "content": "Why?"}]}'): ["Why?"],
    ("speech.json", '[{"id": 1, "conversation": [{"from": "human", "text": "Why?"}]}]'): ["Why?"],
    ("plain.txt", "Why?\n\n  How? \n"): ["Why?", "How?"],
    ("later.jsonl", '{"data": ["Why?"]}\n{"data": []}\n{{\n'): ["Why?", "", ""],
}


@pytest.mark.parametrize(("file", "expected"), SEEDS.items(), ids=lambda value: str(value[0])[:9])
def test_formats_of_seeds(file, expected, tmp_path):
    path = tmp_path / file[0]
    path.write_text(file[1])
    found = list(read_seeds([path]))
    assert [seed.text for seed in found] == expected
    assert [bool(seed.fault) for seed in found] == [not text for text in expected]
    assert found[-1].share == 1 and len({seed.key for seed in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"title": "x", "body": "y"}',
            "in no known format: no instruction .*title, body",
        ),
        ("a.json", "[7]", "in no known format: no instruction"),
        ("a.json", '{"a": 1}', "is no JSON array"),
        ("a.csv", "a,b", "expected a file that ends in .txt, .json, .jsonl"),
    ],
)
def test_unknown_seeds(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        list(read_seeds([path]))


def test_two_files_of_seeds_with_one_name(tmp_path):
    """Found before a file is read: their seeds would have the same keys."""
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.jsonl"]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    words = f"^{paths[0]} and {paths[1]} would give .* expected files of different names$"
    with pytest.raises(ValueError, match=words):
        next(read_seeds(paths))


FAULTS = {
    "Hello, how are you? I'm fine \u2013 \u201cvery\u201d well\u2026": None,
    "It is 5.3 degrees; that's cold.": None,
    "¿Qué tal? Übrigens, 你好。"[:12]: None,
    "You need:\n- flour\n- water": "a list",
    "First:\n1. Mix.\n2. Bake.": "a list",
    "It goes 1. mix, and 2. bake.": "a list",
    "Use `len`.": "code",
    "def add(a, b):\n    return a": "code",
    "# Bread\nMix it.": "markup",
    "That is **very** good.": "markup",
    "See https://example.org for more": "a link",
    "Write to me@example.org today.": "a link",
    "It costs 5 $.": "the symbol '$'",
    "Half of it (about 50).": "the symbol '('",
    "Fine \U0001f600": "the symbol '\U0001f600'",
    "Assistant: Hello.": "a label before the text",
    "...": "no words",
    "one two three four five six seven eight nine ten eleven": "too long",
}


@pytest.mark.parametrize(("text", "expected"), FAULTS.items())
def test_what_cannot_be_spoken(text, expected):
    assert spoken.fault(text, Limits(10)) == expected


def test_digits_and_quotation_marks():
    assert spoken.fault("I have 3 cats.", Limits(10, numbers_as_words=True)) == "digits"
    assert spoken.cleaned(' "Yes,\n it is."\n') == "Yes, it is."
    assert spoken.cleaned('"Yes" and "no"') == '"Yes" and "no"'


MISUSE = {
    ("--out", "o.jsonl"): "give either --grammar or --seeds",
    ("--grammar", "g.yaml", "--seeds", "s.txt", "--out", "o"): "give either --grammar or --seeds",
    ("--grammar", "g.yaml", "--count", "3"): "give the file to write with --out",
    ("--grammar", "g.yaml", "--out", "o"): "say with --count how many",
    ("--grammar", "g.yaml", "--out", "o", "--model", "m"): "are for --seeds",
    (
        *("--grammar", "g.yaml", "--count", "3", "--out", "o", "--attempts", "3"),
        *("--reply-words", "9", "--numbers-as-words"),
    ): "--reply-words, --numbers-as-words, --attempts: for --seeds only",
    (
        *("--grammar", "g.yaml", "--count", "3", "--sentences", "both", "--held-out", "1"),
    ): "--held-out: for dialogues only",
    ("--grammar", "g.yaml", "--out", "o", "--shard", "0/2"): "--workers, --ray and --shard are for",
    ("--grammar", "g.yaml", "--count", "3", "--out", "gs://b/o"): "gs://b/o: expected a local file",
    ("--seeds", "s.txt", "--out", "o"): "--seeds needs --endpoint and --model",
}


@pytest.mark.parametrize(("options", "words"), MISUSE.items())
def test_misused_options(options, words, tmp_path):
    from omni2_jax import console
    from omni2_jax.cli.main import app

    with pytest.raises(SystemExit) as exit:
        console.run(app, ["synthesize", "dialogues", *options])
    assert words in str(exit.value.code) and str(exit.value.code).startswith("error: ")

"""questions.json: faults are found while reading, in one line that names file and item."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.generate.questions import Question, read_questions


@pytest.fixture
def folder(tmp_path):
    recordings.save(tmp_path / "q.wav", np.linspace(-1, 1, 1600), 16000)
    recordings.save(tmp_path / "long.wav", np.zeros(31 * 16000), 16000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def item(id="a", speech="q.wav", text="Yes.") -> dict:
    """A conversation of three turns."""
    turns = [{"from": "human", "speech": speech}, {"from": "gpt", "text": text}]
    return {"id": id, "conversation": [*turns, turns[0]]}


def write(folder, content: object):
    path = folder / "in.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_items(folder, monkeypatch):
    path = write(folder, "\ufeff" + json.dumps([item("a"), item(7, text="<speech>")]))
    sound = folder / "q.wav"
    assert read_questions(path) == [
        Question("a", "a", (sound, "Yes.", sound), f"{path}: item 0 (a)"),
        Question(7, "7", (sound, "<speech>", sound), f"{path}: item 1 (7)"),
    ]
    (folder / "other").mkdir()
    monkeypatch.chdir(folder)
    (question,) = read_questions(write(folder / "other", [item()]))
    assert str(question.turns[0]) == "q.wav"  # relative to the working directory


BAD_ITEMS = {
    "no file's name": (item("a/b"), "item 1: id 'a/b' cannot be a file's name"),
    "null byte": (item("a\0"), r"item 1: id 'a\x00' cannot be a file's name"),
    "line break": (item("a\nb"), r"item 1: id 'a\nb' cannot be a file's name"),
    "surrogate": (item("\ud800"), r"item 1: id '\ud800' cannot be a file's name"),
    "long id": (item("x" * 201), "is too long for a file's name: 201 bytes"),
    "id of another type": (item([1]), "item 1 has no id or no conversation"),
    "surrogate in a text": (item(text="\udcff"), r"item 1 (a): turn 1: 'text' cannot be '\udcff'"),
    "no path": (item(speech=""), "item 1 (a): turn 0: 'speech' cannot be ''"),
    "null byte in a path": (item(speech="\0"), r"turn 0: 'speech' cannot be '\x00'"),
    "long path": (item(speech="a/" * 3000), "item 1 (a): turn 0: 'speech' cannot be 'a/a/"),
    "directory": (item(speech="."), "item 1 (a): {}: Is a directory"),
    "pipe": (item(speech="pipe"), "item 1 (a): {}/pipe is not a regular file"),
    "device": (item(speech="/dev/zero"), "item 1 (a): /dev/zero is not a regular file"),
    "loop": (item(speech="loop"), "item 1 (a): {}/loop: Too many levels of symbolic links"),
    "too long": (item(speech="long.wav"), "item 1 (a): {}/long.wav is 31.00 s long; at most 30 s"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(folder, name):
    bad, complaint = BAD_ITEMS[name]
    path = write(folder, [item("good"), bad])
    with pytest.raises(ValueError) as error:
        read_questions(path)
    line = str(error.value)
    assert line.startswith(f"{path}: item 1") and "\n" not in line
    assert complaint.format(folder) in line


BAD_FILES = {
    "": "Expecting value",
    "[" * 9999: "its JSON is nested too deeply",
    '{"a":' * 9999: "its JSON is nested too deeply",
    f'[{{"id": {"9" * 5000}}}]': "it holds a number of too many digits",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=BAD_FILES.values())
def test_bad_files(folder, content):
    path = write(folder, content)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"cannot read {path}: ")
    assert BAD_FILES[content] in str(error.value)
    with pytest.raises(ValueError, match=r"^/dev/zero is not a regular file$"):
        read_questions(Path("/dev/zero"))


def test_changed_files(folder):
    """Values, places and bytes changed at random, 200 times: questions, or one line."""
    choice = random.Random(0)
    values = ["", ".", "pipe", "\0", "\ud800", "x" * 300, None, 1.5, True, [], {}, [[]], "<speech>"]
    whole = json.dumps([item("a"), item(7)])
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        items = json.loads(whole)
        target = choice.choice([choice.choice(items), choice.choice(items)["conversation"][0]])
        target[choice.choice(list(target))] = choice.choice(values)
        content = json.dumps(items)
        if choice.random() < 0.3:
            place = choice.randrange(len(content))
            content = content[:place] + choice.choice(["[" * 5000, '"', "}", "9" * 5000, ""])
        path = write(folder, content)
        try:
            read_questions(path)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and outcomes["read"] > 5

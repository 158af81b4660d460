"""The model in the box: what commands do that are given no checkpoint."""

import pytest

from omni2_jax.checkpoint import embedded
from omni2_jax.generate.omni2 import Omni2
from tests.support.commands import is_error_line
from tests.support.paths import EXAMPLES

QUESTION = EXAMPLES / "question.wav"
COMMANDS = [
    ["chat", QUESTION],
    ["serve"],
    ["info"],
    ["evaluate", "--task", "latency", "--data", EXAMPLES / "questions.json", "--out", "out"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_model_one_line_says_how_to_give_one(omni2, monkeypatch, tmp_path, command):
    monkeypatch.setattr(embedded, "DIRECTORY", tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    line, out, _ = omni2(*command)
    assert is_error_line(line) and not out
    assert "this installation carries no model" in line and "CKPT" in line


def test_the_embedded_model_is_the_default(omni2, monkeypatch, new_checkpoint):
    monkeypatch.setattr(embedded, "DIRECTORY", new_checkpoint)
    card = new_checkpoint / "README.md"
    card.write_text("# Nano\n\nHears a question,\nand answers it.\n\nMore.\n")
    try:
        code, out, _ = omni2("info")
    finally:
        card.unlink()
    assert code == 0 and str(new_checkpoint) in out
    assert "Hears a question, and answers it.\n" in out and "More" not in out
    assert Omni2.load(speech=False).directory == new_checkpoint


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_takes_it(omni2, monkeypatch, tmp_path, command):
    """They read its config.json, and nothing else of this one can be read."""
    monkeypatch.setattr(embedded, "DIRECTORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    line, *_ = omni2(*command)
    assert is_error_line(line) and f"{tmp_path}/config.json" in line

"""`omni2 prepare` in the process of a test, and what it reads and leaves."""

import io
import json
import sys

import pytest
import rich.console

from omni2_jax.cli.main import main
from omni2_jax.train.data import prepare
from omni2_jax.train.data.dataset import Dataset
from tests.support.paths import EXAMPLES

SPOKEN = EXAMPLES / "training"


def run(*args: object) -> tuple[str | int | None, str]:
    """Run `omni2 prepare` in this process: its exit value, and the report that it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omni2", "prepare", *map(str, args)])
        patch.setattr(prepare, "console", rich.console.Console(file=printed, width=250))
        with pytest.raises(SystemExit) as exit:
            main()
    return exit.value.code, printed.getvalue()


def prepared(source, out, *args: object) -> Dataset:
    code, printed = run("--source", source, "--out", out, *args)
    assert code == 0, (code, printed)
    return Dataset(out)


def lines(*dialogues) -> str:
    """The content of a data.jsonl; a turn is (text, audio) or (text, audio, units)."""

    def keyed(number: int, turn: tuple) -> dict:
        return {"role": ("user", "assistant")[number % 2]} | dict(
            zip(("text", "audio", "units"), turn, strict=False)
        )

    items = [
        {"id": f"d{number}", "turns": [keyed(i, turn) for i, turn in enumerate(turns)]}
        for number, turns in enumerate(dialogues)
    ]
    return "\n".join(map(json.dumps, items))


def content(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }

"""Spoken questions with answers of a known quality, and a recogniser that hears what it is told."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import Item, read_items
from tests.support.paths import EXAMPLES

SPOKEN = EXAMPLES / "training"
REFERENCES = {"sea": ["Blue"], "cats": ["4", "four"], "bread": ["flour and water"], "tea": ["yes"]}
HEARD = {  # what a recogniser makes of the replies
    "sea": "The sea is blue.",
    "cats": "Can't have four legs!",
    "bread": "Bake flour or water.",
    "tea": "",
}


def first_turns() -> dict[str, tuple[Mapping[str, str], Mapping[str, str]]]:
    """The first question and the first reply of every dialogue of the examples, by its id."""
    lines = (SPOKEN / "data.jsonl").read_text().splitlines()
    return {one["id"]: (one["turns"][0], one["turns"][1]) for one in map(json.loads, lines)}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_items(folder: Path) -> Path:
    """Four questions, two of each topic."""
    rows = [
        {
            "id": name,
            "audio": str(SPOKEN / question["audio"]),
            "question": question["text"],
            "answers": REFERENCES[name],
            "topic": "kitchen" if name in ("bread", "tea") else "nature",
        }
        for name, (question, _) in first_turns().items()
    ]
    return write_lines(folder / "items.jsonl", rows)


def write_answers(folder: Path) -> Path:
    """The replies of the examples, as `omni2 chat` writes answers."""
    rows = []
    for name, (_, reply) in first_turns().items():
        rows.append({"question_id": name, "prediction": reply["text"], "prediction_units": ""})
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(SPOKEN / reply["audio"], folder / f"{name}.wav")
    write_lines(folder / "answers.jsonl", rows)
    return folder


def items(folder: Path) -> list[Item]:
    return read_items(write_items(folder))


class ScriptedRecogniser:
    """Hears the texts of `heard` in the replies, which it knows by their length; in anything else
    it hears "words"."""

    workers = 1

    def __init__(self, heard: Mapping[str, str] = HEARD, before: Callable[[], None] | None = None):
        """before: called before each recording is heard."""
        self.texts = {}
        for name, (_, reply) in first_turns().items():
            samples = recordings.load(SPOKEN / reply["audio"], recordings.OUTPUT_RATE)
            self.texts[round(len(samples) / recordings.OUTPUT_RATE, 3)] = heard[name]
        assert len(self.texts) == len(REFERENCES)
        self.before = before

    def transcribe(self, samples: np.ndarray, rate: int) -> str:
        if self.before:
            self.before()
        return self.texts.get(round(len(samples) / rate, 3), "words")

    def describe(self) -> dict[str, Any]:
        return {"kind": "scripted"}

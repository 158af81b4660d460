"""A folder of answers that were given before, by this software or by another.

A line of its .jsonl or .json file, and the wav of the answer:

omni2 chat       answers.jsonl {question_id, prediction, prediction_units} and ID.wav
LLaMA-Omni       answer.json, the same keys in lines, and answer_wav/NUMBER_pred.wav, by line
VoiceBench       MODEL-DATA-SPLIT-audio.jsonl {prompt, response ...}: text alone, by line
UltraEval-Audio  {type: "inference", id, data: {content: text or {text, audio}}}, by number; so does
                 it record GLM-4-Voice's answers
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import AUDIO_KEYS, ID_KEYS, Item
from omni2_jax.evaluate.systems.base import SpokenAnswer
from omni2_jax.files import sha256
from omni2_jax.train.data.sources import SourceError, json_lines

TEXT_KEYS = ("prediction", "response", "text", "content")


@dataclass(frozen=True)
class StoredAnswer:
    """A line of the file. number: of the answer in the file, from 0."""

    number: int
    text: str
    audio: str | None


class AnswersFolder:
    """See this file's description."""

    workers = 8

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted([*folder.glob("*.jsonl"), *folder.glob("answer*.json")])
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(
                f"{folder} is no checkpoint, and as a folder of answers it needs one .jsonl file; "
                f"it has {names}"
            )
        self.file = files[0]
        self.content = functools.cache(sha256)  # of a recording; there may be hours of them
        self.answers = dict(self.lines())
        if not self.answers:
            raise ValueError(f"{self.file} holds no answers")

    def lines(self):
        """(key, answer) for each line; the key is its id, or else its number."""
        number = 0
        for row, _ in json_lines(self.file):
            if isinstance(row, SourceError) or not isinstance(row, Mapping):
                raise ValueError(f"{self.file}: line {number} is no JSON object")
            if row.get("type") == "inference":
                content = (row.get("data") or {}).get("content", "")
                row = {"id": row.get("id"), **parsed(content)}
            elif "type" in row and "data" in row:  # other records of UltraEval-Audio
                continue
            key = next((str(row[k]) for k in ID_KEYS if row.get(k) is not None), str(number))
            text = next((row[k] for k in TEXT_KEYS if isinstance(row.get(k), str)), "")
            audio = next((row[k] for k in AUDIO_KEYS if isinstance(row.get(k), str)), None)
            yield key, StoredAnswer(number, text, audio)
            number += 1

    def describe(self) -> dict[str, Any]:
        recordings_sha256 = self.checksum()
        return {
            "kind": "folder",
            "name": self.folder.name,
            "answers_sha256": sha256(self.file),
            **({"recordings_sha256": recordings_sha256} if recordings_sha256 else {}),
        }

    def checksum(self) -> str | None:
        """Of all recordings, with the answers that they are of; None if there are none."""
        sounds = {name: self.sound(name, answer) for name, answer in self.answers.items()}
        found = {name: self.content(path) for name, path in sounds.items() if path}
        content = json.dumps(found, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest() if found else None

    def check(self, items: Sequence[Item]) -> None:
        """Raise ValueError unless every item has an answer, by its id or by its number."""
        lacking = [item for item in items if item.name not in self.answers]
        if lacking and self.is_numbered() and len(self.answers) == len(items):
            by_number = {answer.number: answer for answer in self.answers.values()}
            self.answers = {item.name: by_number[i] for i, item in enumerate(items)}
        elif lacking:
            raise ValueError(
                f"{self.file} has no answer to {len(lacking)} of {len(items)} items, the first of "
                f"which is {lacking[0].name}"
            )

    def is_numbered(self) -> bool:
        """Whether the answers have numbers in place of ids."""
        return all(key == str(answer.number) for key, answer in self.answers.items())

    def open(self) -> Callable[[Item], SpokenAnswer]:
        return self.answer

    def answer(self, item: Item) -> SpokenAnswer:
        stored = self.answers[item.name]
        path = self.sound(item.name, stored)
        if path is None:
            return SpokenAnswer(stored.text)
        try:
            rate = soundfile.info(path).samplerate
            samples = recordings.load(path, rate)
        except (soundfile.SoundFileError, ValueError) as error:
            raise jobs.Refused("unreadable wav", f"{path}: {error}") from None
        return SpokenAnswer(stored.text, samples, rate)

    def sound(self, name: str, stored: StoredAnswer) -> Path | None:
        """The recording of an answer; None if there is none."""
        places = [stored.audio] if stored.audio else []
        places += [f"{name}.wav", f"wav/{name}.wav", f"answer_wav/{stored.number}_pred.wav"]
        paths = [self.folder / place for place in places]
        return next((path for path in paths if path.is_file()), None)


def parsed(content: object) -> dict[str, Any]:
    """What UltraEval-Audio recorded as an answer: a text, or JSON of a text and a recording."""
    if isinstance(content, str):
        try:
            value = json.loads(content)
        except ValueError:
            return {"text": content}
        return value if isinstance(value, dict) else {"text": content}
    return dict(content) if isinstance(content, Mapping) else {}

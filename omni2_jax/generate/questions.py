"""questions.json, the released format of conversations to answer.

    [{"id": "a", "conversation": [{"speech": "a.wav"}, {"text": "Hello."}, {"speech": "b.wav"}]}]

The user's turns, at even places, are recordings; the assistant's, between them, are texts.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.audio import recordings
from omni2_jax.files import short

MAX_PATH = 4096  # characters of a path; Linux takes no longer ones
MAX_NAME = 200  # bytes of an id; a file's name has 255, of which suffixes take some


@dataclass(frozen=True)
class Question:
    """One conversation to answer.

    id: as in the file, for answers.jsonl. name: the same as text, for the answer's wav. turns: the
    user's recordings at even places, texts between them. context: names file and item in messages.
    """

    id: str | int
    name: str
    turns: tuple[Path | str, ...]
    context: str


def read_questions(
    path: Path, over: str = "refuse", window: int = recordings.TURN_SAMPLES
) -> list[Question]:
    """All items of a questions.json; sound paths are resolved by `sound_path`.

    over: what becomes of turns of more than `window` samples, see `recordings.fit`. Raises
    ValueError naming the file, and where there is one the item, if it cannot be read, or at the
    first item that has no usable id, lacks a turn, or has a recording that cannot be read.
    """
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path} holds no list of questions")
    questions = [parse(path, number, item) for number, item in enumerate(items)]
    names: set[str] = set()
    for question in questions:
        if question.name in names:
            raise ValueError(f"{question.context}: id {question.name!r} is used twice")
        names.add(question.name)
    for question in questions:
        for sound in question.turns[::2]:
            try:
                recordings.load_turn(sound, over, window)
            except ValueError as error:
                raise ValueError(f"{question.context}: {error}") from None
    return questions


def read_json(path: Path) -> object:
    """Raises ValueError, one line naming the file, for what is no JSON."""
    recordings.check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"cannot read {path}: its JSON is nested too deeply") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except ValueError:  # Python's limit for the digits of an integer
        raise ValueError(f"cannot read {path}: it holds a number of too many digits") from None


def parse(path: Path, number: int, item: object) -> Question:
    """Item `number` of a file. Raises ValueError naming both."""
    context = f"{path}: item {number}"
    if not isinstance(item, dict) or not isinstance(item.get("conversation"), list):
        raise ValueError(f"{context} has no id or no conversation")
    id = item.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"{context} has no id or no conversation; an id is a text or a number")
    name = str(id)
    if problem := name_problem(name):
        raise ValueError(f"{context}: id {short(name)} {problem}")
    context = f"{context} ({name})"
    return Question(id, name, parse_turns(path, item["conversation"], context), context)


def parse_turns(path: Path, conversation: Sequence, context: str) -> tuple[Path | str, ...]:
    """The turns of a conversation, from the user's to the user's. Raises ValueError."""
    if len(conversation) % 2 == 0:
        raise ValueError(f"{context}: the conversation does not end with the user's turn")
    turns: list[Path | str] = []
    for index, turn in enumerate(conversation):
        key = "text" if index % 2 else "speech"
        value = turn.get(key) if isinstance(turn, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{context}: turn {index} has no {key!r}")
        if not (is_path(value) if key == "speech" else is_unicode(value)):
            raise ValueError(f"{context}: turn {index}: {key!r} cannot be {short(value)}")
        turns.append(value if index % 2 else sound_path(path, value))
    return tuple(turns)


def name_problem(name: str) -> str | None:
    """What keeps an id from being a file's name; None if nothing does."""
    if name in ("", ".", "..") or "/" in name or not is_unicode(name):
        return "cannot be a file's name"
    if any(ord(character) < 32 for character in name):
        return "cannot be a file's name: it has control characters"
    size = len(name.encode())
    if size > MAX_NAME:
        return f"is too long for a file's name: {size} bytes, at most {MAX_NAME} are expected"
    return None


def is_unicode(text: str) -> bool:
    """False for a text with half a character, which JSON can spell ("\\ud800")."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_path(text: str) -> bool:
    """Whether a text can be the path of a file."""
    return 0 < len(text) <= MAX_PATH and "\0" not in text and is_unicode(text)


def sound_path(questions: Path, sound: str) -> Path:
    """A recording's path: relative to the questions' folder if it lies there, or else, as in the
    released examples, relative to the working directory."""
    beside = questions.parent / sound
    return beside if os.path.exists(beside) or not os.path.exists(sound) else Path(sound)

"""Sources with one question and its reply in each row: SLAM-Omni's JSON lines and parquet files,
and InstructS2S-200K's parquet files.

The question of a later row repeats the dialogue before it, "<USER>: a <ASSISTANT>: b <USER>: c".
Rows that follow one another and repeat each other become one dialogue. The repeated text is cut.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from omni2_jax.audio.recordings import SoundBytes
from omni2_jax.train.data.records import Turn
from omni2_jax.train.data.sources.base import (
    Sound,
    SourceDialogue,
    SourceError,
    checked,
    parse_text,
    parse_units,
    stated_path,
)

IDS = ("id", "key", "index")
QUESTION = ("source_text", "question")
QUESTION_SOUND = ("source_wav", "question_audio")
REPLY = ("target_text", "answer")
REPLY_SOUND = ("target_wav", "answer_audio")
UNITS = ("target_token", "speech_token", "units")
COSYVOICE1 = "answer_cosyvoice_speech_token"  # of CosyVoice 1: 4,096 of them, 50 a second
COSYVOICE1_UNITS = 4096
# So many units of CosyVoice 2, of which there are 6,561, are practically never all below 4,096.
ENOUGH_UNITS = 100
COLUMNS = (*IDS, "split", *QUESTION, *QUESTION_SOUND, *REPLY, *REPLY_SOUND, *UNITS, COSYVOICE1)
MARK = re.compile(r"(?:^|\s)<?(?:USER|ASSISTANT)>?:\s*")


def first(row: Mapping, keys: Iterable[str]) -> tuple[str, object]:
    """The first of the keys that a row has a value for, with the value; or the first key, None."""
    keys = tuple(keys)
    for key in keys:
        if row.get(key) is not None:
            return key, row[key]
    return keys[0], None


def texts(question: str) -> list[str]:
    """The texts of a question that repeats a dialogue: question, reply, ..., the new question."""
    parts = [" ".join(part.split()) for part in MARK.split(question)]
    return parts[1:] if len(parts) > 1 and not parts[0] else parts


def grouped(rows: Iterable[tuple[object, float]]) -> Iterator[tuple[object, float]]:
    """Rows as dialogues {id, "rounds": [row, ...]}, each with the share of the source read so far.

    A SourceError among the rows is passed on. A row continues the dialogue before it if the
    questions that it repeats are exactly that dialogue's.
    """
    group: list[Mapping] = []
    asked: list[str] = []
    read = 0.0
    for row, done in rows:
        question = first(row, QUESTION)[1] if isinstance(row, Mapping) else None
        parts = texts(question) if isinstance(question, str) else []
        continues = bool(group) and len(parts) > 1 and parts[:-1:2] == asked
        if group and not continues:
            yield dialogue_item(group), read
            group, asked = [], []
        read = done
        if isinstance(row, Mapping):
            group.append(row)
            asked.append(parts[-1] if parts else "")
        else:
            yield row, done
    if group:
        yield dialogue_item(group), read


def dialogue_item(group: list[Mapping]) -> Mapping:
    """The rows of a dialogue as one value, with the id and the split of its first row."""
    return {"id": first(group[0], IDS)[1], "split": group[0].get("split"), "rounds": group}


def parse(item: Mapping, file: Path, name: str) -> SourceDialogue:
    """The dialogue of a value from `grouped`. Raises SourceError."""
    turns: list[Turn] = []
    sounds: list[Sound | None] = []
    for number, row in enumerate(item["rounds"]):
        ask, reply = f"turn {2 * number}", f"turn {2 * number + 1}"
        question = parse_text(first(row, QUESTION)[1], ask)
        sounds.append(parse_sound(row, QUESTION_SOUND, file, ask))
        turns.append(Turn("user", parse_text(texts(question)[-1], ask)))
        sounds.append(parse_sound(row, REPLY_SOUND, file, reply))
        text = parse_text(first(row, REPLY)[1], reply)
        turns.append(Turn("assistant", text, reply_units(row, reply, sounds[-1] is not None)))
    return checked(name, turns, sounds)


def reply_units(row: Mapping, context: str, recorded: bool) -> np.ndarray | None:
    """The units of a row's reply, or None. recorded: whether the reply brings a recording.

    Tokens of CosyVoice 1 are not used: SourceError, unless units can be made of the recording.
    """
    key, value = first(row, UNITS)
    units = parse_units(value, context)
    if units is None and row.get(COSYVOICE1) is not None:
        key, foreign = COSYVOICE1, True
    else:
        enough = units is not None and len(units) >= ENOUGH_UNITS
        foreign = units is not None and enough and bool(units.max() < COSYVOICE1_UNITS)
    if foreign and not recorded:
        message = (
            f"{context}: {key!r} holds tokens of CosyVoice 1 ({COSYVOICE1_UNITS} of them, 50 a "
            "second), which are no units of this model, and there is no recording to make units of"
        )
        raise SourceError("tokens of CosyVoice 1", message)
    return None if foreign else units


def parse_sound(row: Mapping, keys: tuple[str, ...], file: Path, context: str) -> Sound | None:
    """The recording of a turn: a path beside the file, or Hugging Face's {"bytes", "path"}."""
    key, value = first(row, keys)
    if not isinstance(value, Mapping):
        path = stated_path(value, key, context)
    elif value.get("bytes"):
        return SoundBytes(value["bytes"], f"the {key} of {context}")
    else:
        path = stated_path(value.get("path"), key, context)
    if path is None:
        return None
    return (file if file.is_dir() else file.parent) / path

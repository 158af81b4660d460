"""Items: spoken questions to answer, with what is known about each of them.

One reader for the formats of the field:

questions.json   the released format of conversations (generate/questions.py); an item may bring
                 `answers`
.jsonl           one object a line. The recording is `audio` (also WavPath, speech, wav; or an
                 object with `path`), its text is `question` (also prompt, instruction, text),
                 and the references are `answers` (also answer, reference), one text or a list.
                 These are the keys of VoiceBench and UltraEval-Audio, too. With `turns`, as
                 `omni2 prepare` reads them, an item is a conversation up to its last user's turn,
                 or, on demand, each of its user's turns is an item.
.parquet         a file, or a folder of files, with the same keys as columns; recordings may be
                 stored in it, as in VoiceBench's and UltraEval-Audio's data sets on Hugging Face

All other keys with short values, as topic, split or voice, are metadata: results are also given for
each of their values.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni2_jax.audio import recordings
from omni2_jax.files import atomic_write, short
from omni2_jax.generate.questions import is_path, name_problem, read_json, sound_path
from omni2_jax.train.data.sources import SourceError, json_lines

AUDIO_KEYS = ("audio", "WavPath", "speech", "wav", "audio_path")
QUESTION_KEYS = ("question", "prompt", "instruction", "QuestionText", "text")
ANSWER_KEYS = ("answers", "answer", "reference")
ID_KEYS = ("id", "key", "question_id")
MAX_METADATA = 60  # characters of a value that items are grouped by
MAX_GROUPS = 200  # values of a key that items are grouped by


@dataclass(frozen=True)
class Item:
    """One question.

    name: its id, fit for a file's name. turns: the user's recordings at even places, the model's
    earlier replies between them. question: the text of the last turn, "" if not known. references:
    right answers, any one of which will do. reply: a whole reply that would be right, or "".
    conversation: the id of the conversation that it belongs to. asked: how many items that
    conversation has.
    """

    name: str
    turns: tuple[Path | str, ...]
    question: str
    references: tuple[str, ...]
    reply: str
    metadata: Mapping[str, str]
    context: str  # names file and item in messages
    conversation: str
    asked: int = 1


def read_items(
    path: Path,
    limit: int | None = None,
    folder: Path | None = None,
    split: str | None = None,
    every_turn: bool = False,
) -> list[Item]:
    """The items of a file or of a folder of parquet files.

    limit: only the first so many conversations, a single question being one. folder: where
    recordings that a parquet file holds are written. split: only items that state it. every_turn:
    all questions of a conversation are items, after the replies that the file states, and not the
    last one alone. Raises ValueError, one line that names file and item, for what cannot be read,
    for recordings that are missing, and if no item is left.
    """
    rows = list(read_rows(path, folder))[: None if split else limit]
    if not rows:
        raise ValueError(f"{path} holds no items")
    parts_of = turn_items if every_turn else last_item
    found = [parts_of(path, number, row) for number, row in enumerate(rows)]
    found = [parts for parts in found if split is None or parts[-1].metadata.get("split") == split]
    if not found:
        raise ValueError(f"{path} has no item of split {split!r}")
    items = [item for parts in found[:limit] for item in parts]
    names: set[str] = set()
    for item in items:
        if item.name in names:
            raise ValueError(f"{item.context}: id {item.name!r} is used twice")
        names.add(item.name)
    check_recordings(path, items)
    return items


def check_recordings(path: Path, items: Sequence[Item]) -> None:
    """Raise ValueError, naming the first item and their number, if recordings are missing."""
    absent = [
        (item, sound)
        for item in items
        for sound in item.turns[::2]
        if isinstance(sound, Path) and not sound.is_file()
    ]
    if absent:
        item, sound = absent[0]
        more = f" (and {len(absent) - 1} more recordings are missing)" if absent[1:] else ""
        raise ValueError(f"{item.context}: there is no recording {sound}{more}")


def groups(items: Sequence[Item], by: Sequence[str] = ()) -> dict[str, dict[str, list[str]]]:
    """Names of items by metadata key and value: of keys with 2 to MAX_GROUPS values.

    by: keys that are taken together, as "split+voices". Raises ValueError, naming it, for a key
    that no item states.
    """
    known = {key for item in items for key in item.metadata}
    for keys in by:
        if unknown := [key for key in keys.split("+") if key not in known]:
            expected = ", ".join(sorted(known)) or "items that state some"
            raise ValueError(f"no item states {unknown[0]!r}, of {keys!r}; expected {expected}")
    found: dict[str, dict[str, list[str]]] = {}
    for item in items:
        values = dict(item.metadata)
        values |= {keys: ", ".join(values.get(k, "-") for k in keys.split("+")) for keys in by}
        for key, value in values.items():
            found.setdefault(key, {}).setdefault(value, []).append(item.name)
    return {key: values for key, values in found.items() if 1 < len(values) <= MAX_GROUPS}


def digest(item: Item) -> str:
    """A text that changes with everything that decides answers and scores, recordings included."""
    content = hashlib.sha256(repr((item.question, item.references, item.reply)).encode())
    for turn in item.turns:
        content.update(turn.read_bytes() if isinstance(turn, Path) else turn.encode())
    return content.hexdigest()


# ---- rows of files ----


def read_rows(path: Path, folder: Path | None) -> Iterator[Mapping[str, Any]]:
    """Every item of a file as it is stored there. Raises ValueError naming the file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir() or path.suffix == ".parquet":
        yield from parquet_rows(path, folder)
        return
    recordings.check_regular(path)
    rows = read_json(path) if path.suffix == ".json" else (item for item, _ in json_lines(path))
    if not isinstance(rows, Iterator | list):
        raise ValueError(f"{path} holds no list of items")
    for number, row in enumerate(rows):
        if isinstance(row, SourceError):
            raise ValueError(f"{path}: item {number}: {row}")
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}: item {number} is {short(row)}, expected an object")
        yield row


def parquet_rows(path: Path, folder: Path | None) -> Iterator[Mapping[str, Any]]:
    """The rows of parquet files; recordings that they hold are written to `folder`."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is a folder without parquet files; give a file of items")
    count = 0
    for file in files:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"cannot read {file}: {error}") from None
        for row in rows:
            audio = row.get("audio")
            if isinstance(audio, Mapping) and audio.get("bytes"):
                if folder is None:
                    raise ValueError(f"{file} holds recordings, and there is no folder for them")
                row["audio"] = str(unpack(audio["bytes"], folder / f"{count:06d}.wav"))
            count += 1
            yield row


def unpack(content: bytes, path: Path) -> Path:
    """A recording's bytes as a file; one that has them already is not written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        with atomic_write(path, "wb") as file:
            file.write(content)
    return path.absolute()


# ---- one item ----


def last_item(path: Path, number: int, row: Mapping[str, Any]) -> list[Item]:
    """The item of a row's last question. Raises ValueError naming file and item."""
    return [item_of(path, number, row)]


def turn_items(path: Path, number: int, row: Mapping[str, Any]) -> list[Item]:
    """The items of all questions of a row. Raises ValueError naming file and item."""
    last = item_of(path, number, row)
    count = len(last.turns) // 2 + 1
    items = []
    for index in range(count - 1):
        turns = row.get("turns", row.get("conversation"))[: 2 * index + 2]
        # What the row itself states of answers is about its last question.
        stated = {k: v for k, v in row.items() if k not in (*ANSWER_KEYS, "conversation")}
        items.append(item_of(path, number, {**stated, "turns": turns}))
    if count == 1:
        return [last]
    return [
        dataclasses.replace(
            item,
            name=f"{last.name}-{index}",
            metadata={**item.metadata, "questions": str(index + 1)},
            asked=count,
        )
        for index, item in enumerate([*items, last])
    ]


def item_of(path: Path, number: int, row: Mapping[str, Any]) -> Item:
    """The item of a row's last question. Raises ValueError naming file and item."""
    name = next((str(row[key]) for key in ID_KEYS if row.get(key) is not None), f"{number:06d}")
    if problem := name_problem(name):
        raise ValueError(f"{path}: item {number}: id {short(name)} {problem}")
    context = f"{path}: item {number} ({name})"
    turns, question, reply = conversation_of(path, row, context)
    used = {*AUDIO_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, *ID_KEYS, "turns", "conversation"}
    nested = row.get("metadata")
    others = {key: value for key, value in row.items() if key not in used}
    others |= nested if isinstance(nested, Mapping) else {}
    if len(turns) > 1:
        others.setdefault("questions", len(turns) // 2 + 1)
    metadata = {
        str(key): str(value)
        for key, value in others.items()
        if isinstance(value, str | int | bool) and len(str(value)) <= MAX_METADATA
    }
    references = references_of(row, context) or references_of(last_turns(row), context)
    return Item(name, turns, question, references, reply, metadata, context, conversation=name)


def conversation_of(
    path: Path, row: Mapping[str, Any], context: str
) -> tuple[tuple[Path | str, ...], str, str]:
    """The turns of a row up to the last user's, the text of that one, and the reply to it."""
    stored = row.get("turns", row.get("conversation"))
    if stored is None:
        audio = next((row[key] for key in AUDIO_KEYS if row.get(key) is not None), None)
        question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), "")
        return (sound_of(path, audio, context),), question, ""
    if not isinstance(stored, list) or not all(isinstance(turn, Mapping) for turn in stored):
        raise ValueError(f"{context}: its turns are no list of objects")
    texts = [turn.get("text") if isinstance(turn.get("text"), str) else "" for turn in stored]
    last = (len(stored) - 1) // 2 * 2  # users speak at even places
    if last < 0:
        raise ValueError(f"{context} has no turn")
    turns: list[Path | str] = []
    for index in range(last + 1):
        if index % 2:
            turns.append(texts[index])
            continue
        audio = next((stored[index][k] for k in AUDIO_KEYS if stored[index].get(k)), None)
        turns.append(sound_of(path, audio, f"{context}: turn {index}"))
    return tuple(turns), texts[last], texts[last + 1] if last + 1 < len(stored) else ""


def last_turns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a row with turns states beside its last question, or beside the reply to it."""
    stored = row.get("turns", row.get("conversation")) or []
    last = (len(stored) - 1) // 2 * 2
    return {key: value for turn in reversed(stored[last:]) for key, value in turn.items()}


def sound_of(path: Path, value: object, context: str) -> Path:
    """The path of a recording. Raises ValueError for what is no path."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if not isinstance(value, str) or not is_path(value):
        raise ValueError(f"{context} has no recording: expected a path under one of {AUDIO_KEYS}")
    return sound_path(path, value)


def references_of(row: Mapping[str, Any], context: str) -> tuple[str, ...]:
    """The right answers that a row states, none if it states none."""
    value = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), [])
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(answer, str | int | float) for answer in values):
        raise ValueError(f"{context}: its answers are {short(value)}, expected texts")
    return tuple(str(answer).strip() for answer in values if str(answer).strip())

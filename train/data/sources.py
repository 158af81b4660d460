"""Where dialogues come from: three ways in which people keep them, read one dialogue at a time.

questions    a JSON array, the released example format: {"id", "conversation": [{"from": "human" | "gpt", "text", "speech", "units"}]},
             `speech` relative to the file (a reply may bring it, and `units`, which the released examples lack)
jsonl        a .jsonl file, or a folder with data.jsonl: a line {"id", "turns": [{"role": "user" | "assistant", "text", "audio", "units"}]},
             `audio` relative to the file
instructs2s  instruct_en_200k_data_cosy2.json of the Hugging Face data set ICTNLP/InstructS2S-200K: as `questions`, but the units
             (CosyVoice 2's) are called `unit`; `speech` is sought where the archives unpack beside it, en/wav/DIR/NAME.wav

Units are a list of numbers, or a string: "<12><6560>" or "12 6560". What a turn does not have it may leave out or give as null.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from omni2_jax.generate.questions import sound_path
from omni2_jax.train.data.records import UNITS, Dialogue, Turn, check

ROLES = {"human": "user", "gpt": "assistant"}
UNIT_TEXT = re.compile(r"(?:<\d{1,9}>)+|\d{1,9}(?:[\s,]+\d{1,9})*")
CHUNK = 2**20  # characters read at a time
LARGEST = 2**26  # characters of one dialogue, at most
DECODER = json.JSONDecoder()


class SourceError(ValueError):
    """A dialogue that cannot be used. kind: what is wrong in a few words, to be counted by; the message says it in full."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class SourceDialogue:
    """A checked dialogue, with the path of each turn's recording, or None."""

    dialogue: Dialogue
    sounds: tuple[Path | None, ...]


@dataclass(frozen=True)
class Entry:
    """A dialogue not looked at yet. where: for messages; read: may raise SourceError; done: how much of the source is read, 0 to 1."""

    where: str
    read: Callable[[], SourceDialogue]
    done: float


@dataclass(frozen=True)
class Format:
    """How a source keeps its dialogues: what yields them, what it calls things, how it states a recording's place."""

    items: Callable[[Path], Iterator[tuple[object, float]]]
    turns: str
    role: str
    sound: str
    units: str
    place: Callable[[Path, str], Path]


def read(path: Path, kind: str | None = None) -> Iterator[Entry]:
    """Every dialogue of a source. kind: a key of FORMATS; None is inferred.

    Raises ValueError, one line naming the file, for one that cannot be read as such; a damaged dialogue raises when its entry is read.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"format {kind!r}; expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    file = path / "data.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} has no data.jsonl")
    return entries(file, FORMATS[kind or infer(file)])


def entries(file: Path, form: Format) -> Iterator[Entry]:
    for number, (item, done) in enumerate(form.items(file)):
        name = item.get("id") if isinstance(item, Mapping) else None
        name = (
            "" if name is None else str(name).encode(errors="replace").decode()
        )  # a lone surrogate is no text
        where = f"{name} (dialogue {number})" if name else f"dialogue {number}"
        yield Entry(where, functools.partial(parse, item, form, file, name or str(number)), done)


def infer(file: Path) -> str:
    """The format of a file, by its ending and by what its first dialogue has."""
    if file.suffix == ".jsonl":
        return "jsonl"
    first, _ = next(json_array(file), (None, 0))
    turns = first.get("conversation") if isinstance(first, Mapping) else None
    named = (
        [turn for turn in turns if isinstance(turn, Mapping) and "unit" in turn]
        if isinstance(turns, list)
        else []
    )
    return "instructs2s" if named else "questions"


# ---- one dialogue ----


def parse(item: object, form: Format, file: Path, name: str) -> SourceDialogue:
    """A dialogue as its source gives it, checked but for its recordings. Raises SourceError."""
    if isinstance(item, SourceError):
        raise item
    if not isinstance(item, Mapping) or not isinstance(item.get(form.turns), list):
        raise SourceError("no turns", f"there is no list {form.turns!r}")
    turns, sounds = [], []
    for index, fields in enumerate(item[form.turns]):
        where = f"turn {index}"
        if not isinstance(fields, Mapping):
            raise SourceError("no turns", f"{where} is {fields!r:.40}, expected an object")
        role, sound = str(fields.get(form.role)), fields.get(form.sound)
        if not isinstance(sound, str | None):
            raise SourceError(
                "no audio", f"{where}: {form.sound!r} is {sound!r:.40}, expected a path"
            )
        units = (
            parse_units(fields.get(form.units), where) if index % 2 else None
        )  # the user's are of no use
        turns.append(Turn(ROLES.get(role, role), parse_text(fields.get("text"), where), units))
        sounds.append(form.place(file, sound) if sound else None)
    try:
        return SourceDialogue(check(Dialogue(name, tuple(turns))), tuple(sounds))
    except ValueError as error:
        raise SourceError("roles not in turn", str(error)) from None


def parse_text(text: object, where: str) -> str:
    try:
        text = text.strip()
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        text = ""
    if not text:
        raise SourceError("no text", f"{where} has no text")
    return text


def parse_units(value: object, where: str) -> np.ndarray | None:
    """The units of a reply, int32 [U]; None if it brings none. Raises SourceError for what is no list of units."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        value = (
            list(map(int, re.findall(r"\d+", value)))
            if UNIT_TEXT.fullmatch(value.strip())
            else None
        )
    if not isinstance(value, list) or not all(type(unit) is int for unit in value):
        raise SourceError("units unreadable", f"{where}: its units are no list of whole numbers")
    bad = [unit for unit in value if not 0 <= unit < UNITS]
    if bad:
        raise SourceError(
            "unit out of range", f"{where} has the unit {bad[0]}, expected 0 to {UNITS - 1}"
        )
    return np.array(value, np.int32)


def beside(file: Path, sound: str) -> Path:
    return file.parent / sound


def unpacked(file: Path, sound: str) -> Path:
    """A recording of the released archives: the longest tail of its stated path that is there, beside the file or in en/wav."""
    parts = Path(sound).parts
    roots = (file.parent, file.parent / "en" / "wav")
    tails = (
        root.joinpath(*parts[start:]) for start, root in itertools.product(range(len(parts)), roots)
    )
    return next((path for path in tails if path.exists()), file.parent / sound)


# ---- files of dialogues ----


def json_lines(file: Path) -> Iterator[tuple[object, float]]:
    """The object in each line; SourceError for a line that is none."""
    size, read = max(1, file.stat().st_size), 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            if line.strip():
                try:
                    yield json.loads(line), read / size
                except ValueError:
                    yield SourceError("no JSON", f"line {number} of {file} is no JSON"), read / size


def json_array(file: Path) -> Iterator[tuple[object, float]]:
    """The elements of a JSON array, of which one at a time is in memory (the released one has 1 GB). Raises ValueError."""
    size, expected = max(1, file.stat().st_size), "["
    with open(file, encoding="utf-8-sig") as text:
        ahead = refilled("", text, file)
        while True:
            mark, ahead = ahead[:1], refilled(ahead[1:], text, file)
            if mark != expected and (mark != "]" or expected == "["):
                raise ValueError(
                    f"{file} is no JSON array of dialogues, or is cut short: {mark!r} where {expected!r} is expected"
                )
            if mark == "]" or (mark == "[" and ahead.startswith("]")):
                return
            element, ahead = json_element(ahead, text, file)
            yield element, text.buffer.tell() / size
            expected, ahead = ",", refilled(ahead, text, file)


def json_element(ahead: str, text: TextIO, file: Path) -> tuple[object, str]:
    """The JSON value at the start of what was read, and what was read behind it."""
    while True:
        try:
            element, end = DECODER.raw_decode(ahead)
            return element, ahead[end:]
        except json.JSONDecodeError as error:
            more = read_on(text, max(CHUNK, len(ahead)), file) if len(ahead) < LARGEST else ""
            if not more:
                raise ValueError(
                    f"{file} is no JSON, or is cut short: {error.msg} at {ahead[error.pos :][:40]!r}"
                ) from None
            ahead += more


def refilled(ahead: str, text: TextIO, file: Path) -> str:
    """What was read and not used, without white space in front; more of it if nothing is left."""
    while not (ahead := ahead.lstrip()) and (more := read_on(text, CHUNK, file)):
        ahead = more
    return ahead


def read_on(text: TextIO, size: int, file: Path) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error.reason}") from None


FORMATS = {
    "questions": Format(json_array, "conversation", "from", "speech", "units", sound_path),
    "jsonl": Format(json_lines, "turns", "role", "audio", "units", beside),
    "instructs2s": Format(json_array, "conversation", "from", "speech", "unit", unpacked),
}

"""Sources of dialogues: four formats of JSON files, read one dialogue at a time.

questions    a JSON array, the released example format:
             {"id", "conversation": [{"from": "human" | "gpt", "text", "speech", "units"}]}
             `speech` is relative to the file, or else to the working directory. A reply may bring
             it, and `units`, which the released examples lack.
jsonl        a .jsonl file, or a folder with data.jsonl. Each line is
             {"id", "turns": [{"role": "user" | "assistant", "text", "audio", "units"}]}
             `audio` is relative to the file.
recordings   a .jsonl file, or a folder with metadata.jsonl: recordings of a voice with their text,
             for the stages of the decoder (`units`, `flow`) and for stage 1b. Each line is
             {"audio", "text", "id", "units"}; `audio` is relative to the file, `id` and `units` may
             be left out.
instructs2s  instruct_en_200k_data_cosy2.json of the Hugging Face data set ICTNLP/InstructS2S-200K:
             as `questions`, but the units (CosyVoice 2's) are called `unit`; `speech` is sought
             where the archives unpack beside the file, en/wav/DIR/NAME.wav

A line or an element may state its "split", as "train" or "test", of which a reader can ask for one.
Units are a list of numbers, or a text: "<12><6560>" or "12 6560". What a turn lacks may be left out
or be null; of recordings and units it may also be empty.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from omni2_jax.audio.recordings import check_regular
from omni2_jax.files import short
from omni2_jax.generate.questions import is_path, is_unicode, sound_path
from omni2_jax.train.data.records import UNITS, Dialogue, Turn, check

ROLES = {"human": "user", "gpt": "assistant"}
UNIT_TEXT = re.compile(r"(?:<\d{1,9}>)+|\d{1,9}(?:[\s,]+\d{1,9})*")
BLOCK = 2**20  # characters read at a time
MAX_DIALOGUE = 2**26  # characters of a dialogue
MAX_ID = 1000  # characters of an id
DECODER = json.JSONDecoder()
# A text of JSON, which may be cut off by the end of what was read; or a bracket.
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


class SourceError(ValueError):
    """A dialogue that cannot be used. kind: the fault in a few words, for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class SourceDialogue:
    """A dialogue that keeps the rules, with the path of each turn's recording, or None."""

    dialogue: Dialogue
    sounds: tuple[Path | None, ...]


@dataclass(frozen=True)
class Entry:
    """A dialogue that is not parsed yet.

    context: names it in messages. read: parses it; raises SourceError if it cannot be used.
    done: the share of the source that was read, 0 to 1.
    """

    context: str
    read: Callable[[], SourceDialogue]
    done: float


@dataclass(frozen=True)
class Format:
    """How a source keeps its dialogues.

    items: yields each dialogue's JSON value (or a SourceError for what is none) and `Entry.done`.
    turns, role, sound, units: the keys of these. resolve: the path of a recording, from the path
    of the source and the stated one.
    """

    items: Callable[[Path], Iterator[tuple[object, float]]]
    turns: str
    role: str
    sound: str
    units: str
    resolve: Callable[[Path, str], Path]


def read(path: Path, kind: str | None = None, split: str | None = None) -> Iterator[Entry]:
    """The dialogues of a source. kind: a key of FORMATS; None is inferred from the file.

    split: only those that state this split; None is all of them.

    Raises ValueError, one line naming the file, if it cannot be read in this format: partly when
    the iterator arrives at the fault. A dialogue that cannot be used raises when its entry is read.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"format {kind!r}; expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    file = path
    if path.is_dir():
        names = [name for name in ("data.jsonl", "metadata.jsonl") if (path / name).exists()]
        if not names:
            raise ValueError(f"{path} has no data.jsonl and no metadata.jsonl")
        file = path / names[0]
    check_regular(file)
    return entries(file, FORMATS[kind or infer(file)], split)


def entries(file: Path, form: Format, split: str | None = None) -> Iterator[Entry]:
    """The dialogues of a file, numbered from 0; one without an id is called by its number.

    Raises ValueError, when all of them are read, if none is of the `split`.
    """
    others: set[str] = set()
    found = False
    for number, (item, done) in enumerate(form.items(file)):
        if split is not None and isinstance(item, Mapping) and item.get("split") != split:
            others.add(short(item.get("split")))
            continue
        id = item.get("id") if isinstance(item, Mapping) else None
        name = ""
        if isinstance(id, str | int | float):
            name = str(id).encode(errors="replace").decode()  # JSON can spell half a character
        label = "".join(c if c.isprintable() else "?" for c in name[:80])
        context = f"{label} (dialogue {number})" if name else f"dialogue {number}"
        found = True
        yield Entry(context, functools.partial(parse, item, form, file, name or str(number)), done)
    if split is not None and not found:
        states = f"; it has {', '.join(sorted(others))}" if others else ""
        raise ValueError(f"{file} has no dialogue of split {split!r}{states}")


def infer(file: Path) -> str:
    """The format of a file, by its suffix and by the keys of its first dialogue."""
    if file.suffix == ".jsonl":
        first, _ = next(json_lines(file), (None, 0))
        return "recordings" if isinstance(first, Mapping) and "audio" in first else "jsonl"
    first, _ = next(json_array(file), (None, 0))
    turns = first.get("conversation") if isinstance(first, Mapping) else None
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, Mapping) and "unit" in turn:
                return "instructs2s"
    return "questions"


# ---- one dialogue ----


def parse(item: object, form: Format, file: Path, name: str) -> SourceDialogue:
    """The dialogue of a JSON value; its recordings are not looked at. Raises SourceError."""
    if isinstance(item, SourceError):
        raise item
    if len(name) > MAX_ID:
        raise SourceError("id too long", f"its id has {len(name)} characters, at most {MAX_ID} fit")
    if not isinstance(item, Mapping) or not isinstance(item.get(form.turns), list):
        raise SourceError("no turns", f"there is no list {form.turns!r}")
    turns, sounds = [], []
    for index, fields in enumerate(item[form.turns]):
        context = f"turn {index}"
        if not isinstance(fields, Mapping):
            raise SourceError("no turns", f"{context} is {short(fields)}, expected an object")
        sounds.append(parse_sound(fields.get(form.sound), form, file, context))
        role = str(fields.get(form.role))
        role = ROLES.get(role, role)
        # Units of the user's turns are not used.
        units = parse_units(fields.get(form.units), context) if role != "user" else None
        turns.append(Turn(role, parse_text(fields.get("text"), context), units))
    try:
        return SourceDialogue(check(Dialogue(name, tuple(turns))), tuple(sounds))
    except ValueError as error:
        raise SourceError("roles not in turn", str(error)) from None


def parse_sound(value: object, form: Format, file: Path, context: str) -> Path | None:
    """The path of a turn's recording; None for a turn without one. Raises SourceError."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not is_path(value):
        message = f"{context}: {form.sound!r} is {short(value)}, expected a path"
        raise SourceError("no audio", message)
    return form.resolve(file, value)


def parse_text(value: object, context: str) -> str:
    """A turn's text without white space around it. Raises SourceError if nothing is left."""
    if not isinstance(value, str) or not value.strip():
        raise SourceError("no text", f"{context} has no text")
    if not is_unicode(value):
        raise SourceError("no text", f"{context} has no text: {short(value)} cannot be encoded")
    return value.strip()


def parse_units(value: object, context: str) -> np.ndarray | None:
    """The units of a reply, int32 [U]; None if it brings none. Raises SourceError."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str) and UNIT_TEXT.fullmatch(value.strip()):
        value = [int(digits) for digits in re.findall(r"\d+", value)]
    if not isinstance(value, list) or not all(type(unit) is int for unit in value):
        message = f"{context}: its units are no list of whole numbers"
        raise SourceError("units unreadable", message)
    outside = [unit for unit in value if not 0 <= unit < UNITS]
    if outside:
        message = f"{context} has the unit {short(outside[0])}, expected 0 to {UNITS - 1}"
        raise SourceError("unit out of range", message)
    return np.array(value, np.int32)


def beside(file: Path, sound: str) -> Path:
    """A recording of a .jsonl."""
    return file.parent / sound


def unpacked(file: Path, sound: str) -> Path:
    """A recording of the released archives: the longest end of its stated path that exists, beside
    the file or in en/wav."""
    parts = Path(sound).parts
    roots = (file.parent, file.parent / "en" / "wav")
    for start, root in itertools.product(range(len(parts)), roots):
        path = root.joinpath(*parts[start:])
        if os.path.exists(path):
            return path
    return file.parent / sound


# ---- files of dialogues ----


def recording_lines(file: Path) -> Iterator[tuple[object, float]]:
    """The lines of recordings with their text, each as a dialogue of a single assistant turn."""
    for item, done in json_lines(file):
        if isinstance(item, Mapping):
            item = {**item, "turns": [{**item, "role": "assistant"}]}
        yield item, done


def json_lines(file: Path) -> Iterator[tuple[object, float]]:
    """The JSON value of each line that is not empty; SourceError for a line that is no JSON."""
    size, done = max(1, file.stat().st_size), 0
    with open(file, "rb") as lines:
        for number in itertools.count(1):
            line = lines.readline(MAX_DIALOGUE)
            done += len(line)
            if not line:
                return
            item: object = SourceError("no JSON", f"line {number} of {file} is no JSON")
            if len(line) == MAX_DIALOGUE and not line.endswith(b"\n"):
                done += skip_line(lines)
            elif not line.strip():
                continue
            else:
                # ValueError includes Python's limit for the digits of an integer.
                with contextlib.suppress(ValueError, RecursionError):
                    item = json.loads(line)
            yield item, done / size


def skip_line(lines: BinaryIO) -> int:
    """Read to the end of a line; the number of bytes."""
    size = 0
    while line := lines.readline(BLOCK):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def json_array(file: Path) -> Iterator[tuple[object, float]]:
    """The elements of a JSON array, one at a time in memory (the released file has 1 GB).

    SourceError for an element beyond Python's limits. Raises ValueError naming the file if it is no
    JSON array, or no text in UTF-8.
    """
    size, expected = max(1, file.stat().st_size), "["
    with open(file, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
        buffer = refill("", text, file)
        while True:
            mark, buffer = buffer[:1], refill(buffer[1:], text, file)
            if mark != expected and (mark != "]" or expected == "["):
                raise ValueError(
                    f"{file} is no JSON array of dialogues, or is cut short: {mark!r} where "
                    f"{expected!r} is expected"
                )
            if mark == "]" or (mark == "[" and buffer.startswith("]")):
                return
            element, buffer = json_element(buffer, text, file)
            yield element, raw.tell() / size
            expected, buffer = ",", refill(buffer, text, file)


def json_element(buffer: str, text: TextIO, file: Path) -> tuple[object, str]:
    """The JSON value that begins with `buffer`, and the characters that were read behind it.

    SourceError for a value that Python refuses: nested too deeply, or an integer of too many
    digits. Raises ValueError for what is no JSON, and for more than MAX_DIALOGUE characters.
    """
    while True:
        try:
            element, end = DECODER.raw_decode(buffer)
            return element, buffer[end:]
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at {buffer[error.pos :][:40]!r}"
        except (RecursionError, ValueError):
            reason = "it is nested too deeply, or holds a number of too many digits"
            if end := element_end(buffer):
                return SourceError("no JSON", reason), buffer[end:]
        more = read_on(text, max(BLOCK, len(buffer)), file) if len(buffer) < MAX_DIALOGUE else ""
        if not more:
            raise ValueError(f"{file} is no JSON, or is cut short: {reason}")
        buffer += more


def element_end(buffer: str) -> int | None:
    """The index behind the object or array that `buffer` begins with, found by its brackets alone;
    None if it does not end in `buffer`."""
    depth = 0
    for token in JSON_TOKEN.finditer(buffer):
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def refill(buffer: str, text: TextIO, file: Path) -> str:
    """The buffer without white space at its start; if nothing is left, the next characters."""
    while not (buffer := buffer.lstrip()) and (more := read_on(text, BLOCK, file)):
        buffer = more
    return buffer


def read_on(text: TextIO, size: int, file: Path) -> str:
    """The next `size` characters. Raises ValueError for what is no UTF-8."""
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error.reason}") from None


FORMATS = {
    "questions": Format(json_array, "conversation", "from", "speech", "units", sound_path),
    "jsonl": Format(json_lines, "turns", "role", "audio", "units", beside),
    "recordings": Format(recording_lines, "turns", "role", "audio", "units", beside),
    "instructs2s": Format(json_array, "conversation", "from", "speech", "unit", unpacked),
}

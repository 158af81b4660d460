"""What all sources share: a dialogue that is not parsed yet, and the reading of texts and units."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni2_jax.audio.recordings import SoundBytes
from omni2_jax.files import short
from omni2_jax.generate.questions import is_path, is_unicode
from omni2_jax.train.data.records import UNITS, Dialogue, Turn, check

UNIT_TEXT = re.compile(r"(?:<\d{1,9}>)+|\d{1,9}(?:[\s,]+\d{1,9})*")
MAX_ID = 1000  # characters of an id

# Where the recording of a turn is: in a file, or in the source itself.
Sound = Path | SoundBytes


class SourceError(ValueError):
    """A dialogue that cannot be used. kind: the fault in a few words, for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, or it could not be pickled
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class SourceDialogue:
    """A dialogue that keeps the rules, with each turn's recording, or None."""

    dialogue: Dialogue
    sounds: tuple[Sound | None, ...]


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

    items: yields, for a file, each dialogue's value (or a SourceError for what is none) and
    `Entry.done`. parse: the dialogue of a value, from the value, the path of the file and the
    dialogue's name; raises SourceError.
    """

    items: Callable[[Path], Iterator[tuple[object, float]]]
    parse: Callable[[Mapping, Path, str], SourceDialogue]


def entries(file: Path, form: Format, split: str | None = None) -> Iterator[Entry]:
    """The dialogues of a file, numbered from 0; one without an id is called by its number.

    split: only those that state this split; None is all of them.
    Raises ValueError, when all of them are read, if none is of the `split`.
    """
    others: set[str] = set()
    found = False
    for number, (item, done) in enumerate(form.items(file)):
        if split is not None and isinstance(item, Mapping) and item.get("split") != split:
            others.add(short(item.get("split")))
            continue
        name = item_id(item)
        label = "".join(c if c.isprintable() else "?" for c in name[:80])
        context = f"{label} (dialogue {number})" if name else f"dialogue {number}"
        found = True
        yield Entry(context, functools.partial(parse, item, form, file, name or str(number)), done)
    if split is not None and not found:
        states = f"; it has {', '.join(sorted(others))}" if others else ""
        raise ValueError(f"{file} has no dialogue of split {split!r}{states}")


def item_id(item: object) -> str:
    """The id of a dialogue's value; an empty text if it has none."""
    id = item.get("id") if isinstance(item, Mapping) else None
    if not isinstance(id, str | int | float):
        return ""
    return str(id).encode(errors="replace").decode()  # JSON can spell half a character


def parse(item: object, form: Format, file: Path, name: str) -> SourceDialogue:
    """The dialogue of a value; its recordings are not looked at. Raises SourceError."""
    if isinstance(item, SourceError):
        raise item
    if len(name) > MAX_ID:
        raise SourceError("id too long", f"its id has {len(name)} characters, at most {MAX_ID} fit")
    if not isinstance(item, Mapping):
        raise SourceError("no turns", f"it is {short(item)}, expected an object")
    return form.parse(item, file, name)


def checked(name: str, turns: list[Turn], sounds: list[Sound | None]) -> SourceDialogue:
    """A dialogue of these turns. Raises SourceError if they break a rule of `records.check`."""
    try:
        return SourceDialogue(check(Dialogue(name, tuple(turns))), tuple(sounds))
    except ValueError as error:
        raise SourceError("roles not in turn", str(error)) from None


def stated_path(value: object, key: str, context: str) -> str | None:
    """The path of a recording as stated; None for a turn without one. Raises SourceError."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not is_path(value):
        raise SourceError("no audio", f"{context}: {key!r} is {short(value)}, expected a path")
    return value


def parse_text(value: object, context: str, may_be_empty: bool = False) -> str:
    """A turn's text without white space around it. Raises SourceError if nothing is left.

    may_be_empty: allows the text "", for a recording in which nobody speaks.
    """
    if may_be_empty and value == "":
        return ""
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

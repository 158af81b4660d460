"""Files of JSON values, read one value at a time."""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from omni2_jax.train.data.sources.base import SourceError

BLOCK = 2**20  # characters read at a time
MAX_DIALOGUE = 2**26  # characters of a dialogue
DECODER = json.JSONDecoder()
# A text of JSON, which may be cut off by the end of what was read; or a bracket.
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


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

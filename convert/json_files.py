"""JSON files of a release, read within limits, so that a hostile one cannot fill the memory."""

import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omni2_jax.convert.plan import ConversionError
from omni2_jax.validation import validated

MAX_BYTES = 64 * 2**20  # Qwen's tokenizer.json, the largest JSON file of a release, has 11 MB

T = TypeVar("T")

short = reprlib.Repr()  # values of a file, cut to a length that fits a message
short.maxstring = short.maxother = 60
short.maxlong = 30


def regular_file(path: Path) -> Path:
    """`path`, unless it is something that cannot be read like a file.

    Raises ConversionError if `path` is a directory, a pipe or a device, which could block for ever.
    A missing path passes: opening it says so.
    """
    if path.exists() and not path.is_file():
        raise ConversionError(f"{path} is not a regular file")
    return path


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises ConversionError if the file is missing, unreadable, larger than MAX_BYTES, not JSON,
    nested too deeply, or holds something else than an object.
    """
    try:
        size = regular_file(path).stat().st_size
        if size > MAX_BYTES:
            raise ConversionError(
                f"{path} has {size} bytes, expected a JSON file of {MAX_BYTES} at most"
            )
        return parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from None


def parse(content: bytes, context: Path | str) -> dict[str, Any]:
    """The object in JSON text; `context` starts the message of an error.

    Raises ConversionError if the text is not JSON, is nested too deeply, has an integer with more
    digits than Python converts (4300), or holds something else than an object.
    """
    try:
        value = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"cannot read {context}: it is not JSON: {error}") from None
    except RecursionError:
        raise ConversionError(f"cannot read {context}: its JSON is nested too deeply") from None
    except ValueError:  # Python's own message advises to raise its limit
        digits = sys.get_int_max_str_digits()
        raise ConversionError(
            f"cannot read {context}: it has an integer of more than {digits} digits"
        ) from None
    if not isinstance(value, dict):
        raise ConversionError(f"{context} holds a {type(value).__name__}, expected an object")
    return value


def checked(
    kind: type[T],
    context: Path | str,
    fields: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> T:
    """A configuration of class `kind` with these fields.

    names: field (`adapter.stride` for one of a part) -> its name in the file, for messages.
    Raises ConversionError, which starts with `context`, listing every field that is wrong.
    """
    try:
        return validated(kind, fields, context, names=names)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def inside(directory: Path, name: object, context: Path | str) -> Path:
    """The file `name` of `directory`, where `name` comes from a file of it.

    Only the name is judged: links are followed, as the Hugging Face cache is made of links.
    Raises ConversionError, which starts with `context`, if `name` is not a text, cannot be a path,
    or leads out of the directory.
    """
    if not isinstance(name, str) or not name or "\0" in name or not encodable(name):
        raise ConversionError(f"{context} is {short.repr(name)}, expected the name of a file")
    if leads_outside(name):
        raise ConversionError(
            f"{context} is {short.repr(name)}, expected the name of a file inside {directory}"
        )
    return directory / name


def leads_outside(name: str) -> bool:
    """Whether a path that a file states leads out of the directory of that file."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def encodable(text: str) -> bool:
    """Whether a text is Unicode; JSON can also spell one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

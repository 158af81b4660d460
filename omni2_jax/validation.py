"""Reading settings into typed classes, with every fault of a file in one line."""

import functools
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

T = TypeVar("T")

MAX_FAULTS = 5  # faults that one message lists


def validated(
    kind: type[T],
    data: str | bytes | Mapping[str, Any],
    context: object,
    renamed: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> T:
    """An instance of `kind`, a dataclass or any type pydantic knows, from JSON text or a mapping.

    JSON must hold exactly the types of the fields. In a mapping, lists may stand for tuples, and
    numbers are converted where nothing is lost.
    context: the file or option that the data comes from; the message begins with it.
    renamed: dotted names of former settings -> hint, e.g. {"hift": "is called vocoder now"}.
    names: dotted names of fields -> names in the file, where it has others.
    Raises ValueError, one line, naming `context` and every setting that is wrong.
    """
    adapter = adapter_of(kind)
    try:
        if isinstance(data, str | bytes):
            return adapter.validate_json(data, strict=True)
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        raise ValueError(f"{context}: {describe(error, renamed, names)}") from None


@functools.cache
def adapter_of(kind: type[T]) -> pydantic.TypeAdapter[T]:
    """What validates a type. Building it takes a millisecond, and files have a record a line."""
    return pydantic.TypeAdapter(kind)


def describe(
    error: pydantic.ValidationError,
    renamed: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> str:
    """The faults that a validation found, in one line: "llm.heads is 0, expected ...; ...".

    Former names of settings are listed alone: the other faults often follow from them.
    """
    renamed, names, details = renamed or {}, names or {}, error.errors(include_url=False)
    faults = [fault(item, renamed, names) for item in details if dotted(item) in renamed]
    faults = faults or [fault(item, renamed, names) for item in details]
    more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return "; ".join(faults[:MAX_FAULTS] + more)


def dotted(details: Any) -> str:
    """The name of the setting that a fault (pydantic's `ErrorDetails`) is about."""
    return ".".join(map(str, details["loc"]))


def fault(details: Any, renamed: Mapping[str, str], names: Mapping[str, str]) -> str:
    """One fault, as "NAME is VALUE, expected ..."."""
    name, message = dotted(details), details["msg"]
    for field, other in names.items():
        if f"{name}.".startswith(f"{field}."):  # the field, or an entry of it
            name = other + name.removeprefix(field)
            break
    match details["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{name} {renamed.get(name, 'is not the name of a setting')}"
        case "missing":
            return f"{name} is missing"
        case "json_invalid":
            return message.replace("Invalid JSON:", "it is not JSON:")
        case "value_error":
            text = str(details["ctx"]["error"])
            return f"{name}: {text}" if name else text
    expected = message.replace("Input should be", "expected").replace("Unable", "unable")
    expected = f"{name or 'the content'} is {shown(details['input'])}, {expected}"
    return " ".join(expected.split())


def shown(value: object) -> str:
    """A value as a message shows it: short, whatever its size."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return "an object"
    return reprlib.repr(value)

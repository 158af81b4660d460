"""What a client is told of fields that pydantic refuses."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails


def describe(error: ValidationError, given: Any) -> tuple[str, str]:
    """Where one of the faults is, and what is wrong there: ("messages.0.role", "Field required").

    given: the client's object. The place is "" if the object as a whole is at fault.

    A field of several types has the faults of each of them, of which that of the type that was
    meant tells most: the deepest one, and there rather of a value than of its type.
    """
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda fault: (len(fault["loc"]), not is_of_type(fault)))
    return ".".join(place(fault, given)), fault["msg"]


def is_of_type(fault: ErrorDetails) -> bool:
    """Whether a fault says that a value is of another type than a field, or than a union's part."""
    return fault["type"].endswith("_type") or fault["type"] == "literal_error"


def place(fault: ErrorDetails, given: Any) -> list[str]:
    """The names and numbers that lead to a fault, without pydantic's own names of types."""
    names: list[str] = []
    *_, last = fault["loc"] or ("",)
    for name in fault["loc"]:
        inner: Any = dict(enumerate(given)) if isinstance(given, list) else given
        if isinstance(inner, dict) and name in inner:
            given = inner[name]
        elif name != "[key]" and (fault["type"], name) != ("missing", last):
            continue  # a type's name
        names.append(str(name))
    return names

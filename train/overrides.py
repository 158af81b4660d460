"""Changes of settings, `--set key=value`: reading them, checking them, and what an unknown key may
have been meant to be.
"""

import ast
import dataclasses
import difflib
from collections.abc import Sequence

import pydantic

from omni2_jax.train.settings import RENAMED, TrainConfig


def changed(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """A configuration with `key=value` changes; keys may have dots: optimizer.peak=1e-4.

    A value is a Python literal or a text. Raises ValueError naming the change and what is wrong
    with it.
    """
    tree = dataclasses.asdict(config)
    for change in changes:
        key, equals, text = (part.strip() for part in change.partition("="))
        *path, last = key.split(".")
        parent = tree
        for name in path:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(parent, dict) or last not in parent:
            hint = renamed(key) or nearest(key, list(flat(tree)))
            raise ValueError(f"--set {change}: there is no {key!r}{hint}")
        if not equals:
            raise ValueError(f"--set {change}: expected {key}=value")
        # A setting that is a text stays one: a directory may be named 2024.
        parent[last] = text if isinstance(parent[last], str) else literal(text)
    return validated(tree, "--set " + " ".join(changes))


def validated(tree: dict, context: str) -> TrainConfig:
    """A configuration from a dictionary. Raises one ValueError, after `context`, for all faults."""
    try:
        return pydantic.TypeAdapter(TrainConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        faults = []
        for item in error.errors():
            path = "".join(f"{name}." for name in item["loc"])[:-1]
            message = item["msg"].removeprefix("Value error, ")
            faults.append(f"{path}: {message}" if path else message)
        raise ValueError(f"{context}: {'; '.join(faults)}") from None


def literal(text: str) -> object:
    """A Python literal, or none, true and false in any case; any other text stays a text."""
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries by dotted keys; the inner dictionaries are values, too."""
    values = {}
    for name, value in tree.items():
        values[prefix + name] = value
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
    return values


def renamed(key: str) -> str:
    """A hint if a part of a dotted key, or a class name, has been renamed; else an empty text."""
    new_key = ".".join(RENAMED.get(name, name) for name in key.split("."))
    return f"; it is now called {new_key}" if new_key != key else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a mistyped key or one without its prefix; empty if no known key is near."""
    with_prefix = [key for key in known if key.endswith(f".{name}")]
    close = with_prefix or difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""

"""The one converter: a table of rules maps source tensors to our stacked parameters, and back.

A rule names one target parameter and the source tensors it is made of. `{i}` and `{j}` in a source
name run over the leading (layer) axes of the target. All names and shapes are checked before any
data is read: unused, missing and misshapen tensors are reported together.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten

LAYER_LETTERS = "ij"  # in the names of sources; no part has more than two layer axes


class ConversionError(ValueError):
    """The source cannot be converted; the message names the file and says what is wrong."""


@dataclass(frozen=True)
class Transform:
    """How the source tensors of one layer become its parameter, and back.

    `forward(*sources, shape)` returns the parameter, which has that shape.
    `backward(parameter)` returns the tuple of sources. Both use only `reshape`, `transpose` and
    arithmetic, so they run on arrays and on abstract shapes alike.
    """

    forward: Callable[..., np.ndarray]
    backward: Callable[[Any], tuple]


same = Transform(lambda x, shape: x, lambda y: (y,))
flat = Transform(lambda x, shape: x.reshape(shape), lambda y: (y.reshape(-1),))


def kernel(in_dims: int = 1) -> Transform:
    """torch Linear weight [out, in] <-> kernel [in..., out...]; the first `in_dims` axes are in."""

    def backward(y):
        rows = int(np.prod(y.shape[:in_dims]))
        return (y.reshape(rows, -1).transpose(),)

    return Transform(lambda x, shape: x.transpose().reshape(shape), backward)


# torch Conv1d weight [out, in, K] <-> kernel [K, in, out]
conv = Transform(lambda x, shape: x.transpose(2, 1, 0), lambda y: (y.transpose(2, 1, 0),))


@dataclass(frozen=True)
class Rule:
    """`target` (dotted path) is made of `sources` (name templates) by `transform`.

    A rule without sources generates its target.
    """

    sources: tuple[str, ...] | str
    target: str
    transform: Transform = same

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.sources,) if isinstance(self.sources, str) else self.sources

    def names(self, index: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the sources of the layer at `index`."""
        letters = dict(zip(LAYER_LETTERS, index, strict=False))
        return tuple(template.format(**letters) for template in self.templates)

    @property
    def stacked_axes(self) -> int:
        """How many leading axes of the target are layer axes."""
        first = "".join(self.templates[:1])
        return sum("{" + letter + "}" in first for letter in LAYER_LETTERS)


@dataclass(frozen=True)
class Table:
    """Rules of one part, or of several.

    aliases: name of an optional copy -> name of the tensor that it must equal.
    dropped: pattern of names that are not needed -> why.
    """

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    def at(self, source: str = "", target: str = "") -> "Table":
        """The same table with prefixes in front of every source and target name."""

        def moved(rule: Rule) -> Rule:
            names = tuple(source + name for name in rule.templates)
            return Rule(names, target + rule.target, rule.transform)

        return Table(
            tuple(moved(rule) for rule in self.rules),
            {source + copy: source + original for copy, original in self.aliases.items()},
            {re.escape(source) + pattern: why for pattern, why in self.dropped.items()},
        )

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.rules + other.rules,
            {**self.aliases, **other.aliases},
            {**self.dropped, **other.dropped},
        )


def indices(rule: Rule, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every index of the leading layer axes that a rule stacks over."""
    return list(itertools.product(*(range(n) for n in shape[: rule.stacked_axes])))


def source_shapes(rule: Rule, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that the sources of one layer of a target must have."""
    layer = jax.ShapeDtypeStruct(shape[rule.stacked_axes :], np.float32)
    return [s.shape for s in jax.eval_shape(rule.transform.backward, layer)]


def plan(table: Table, source: Mapping[str, LazyArray], target: Mapping, context: str) -> dict:
    """Check a part completely and return its parameter tree, every leaf a `LazyArray`.

    source: lazy tensors by name, only those of this part. target: nested dict of ShapeDtypeStruct.
    context: the file or directory, which starts the message of an error.
    Raises ConversionError with every complaint if the source does not fit.
    """
    leaves: dict[str, Any] = flatten(target)
    planned: dict[str, LazyArray] = {}
    used: set[str] = set()
    complaints: list[str] = []
    for rule in table.rules:
        if rule.target not in leaves:
            complaints.append(f"the table sets {rule.target}, which the model does not have")
            continue
        shape = leaves[rule.target].shape
        names = [rule.names(index) for index in indices(rule, shape)]
        used.update(itertools.chain.from_iterable(names))
        if faults := list(misfits(names, source_shapes(rule, shape), source)):
            complaints += faults
            continue
        dtype = common_dtype([source[name].dtype for layer in names for name in layer])
        planned[rule.target] = LazyArray(shape, dtype, reader(rule, source, shape, dtype))
    set_here = {rule.target for rule in table.rules}
    complaints += [f"nothing in the table sets {path}" for path in leaves if path not in set_here]
    for alias, original in table.aliases.items():
        if alias in source:
            used.add(alias)
            if original in source:
                complaints += compare(alias, source[alias], original, source[original])
    complaints += [
        f"unexpected {name}"
        for name in source
        if name not in used and not any(re.fullmatch(p, name) for p in table.dropped)
    ]
    if complaints:
        raise ConversionError(f"{context}: " + summary(complaints))
    return jax.tree.unflatten(jax.tree.structure(target), [planned[path] for path in leaves])


def misfits(
    names: Iterable[tuple[str, ...]],
    shapes: list[tuple[int, ...]],
    source: Mapping[str, LazyArray],
) -> Iterator[str]:
    """What is wrong with the sources of one rule; `names` has a tuple of them for every layer."""
    for layer in names:
        for name, shape in zip(layer, shapes, strict=True):
            if name not in source:
                yield f"missing {name} (shape {list(shape)})"
            elif tuple(source[name].shape) != shape:
                yield f"{name} has shape {list(source[name].shape)}, expected {list(shape)}"
            elif not jnp.issubdtype(source[name].dtype, jnp.floating):
                yield f"{name} has type {source[name].dtype}, expected a floating-point type"


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type that holds all of `dtypes`; float32 for an empty list."""
    distinct = set(dtypes)
    if len(distinct) > 1:
        return np.result_type(*distinct)
    return next(iter(distinct), np.dtype(np.float32))


def summary(complaints: list[str], shown: int = 20) -> str:
    """All complaints in one line, the first `shown` in full."""
    rest = f"; and {len(complaints) - shown} more" if len(complaints) > shown else ""
    count = "1 tensor does" if len(complaints) == 1 else f"{len(complaints)} tensors do"
    return f"{count} not fit: " + "; ".join(complaints[:shown]) + rest


def compare(alias: str, copy: LazyArray, original_name: str, original: LazyArray) -> list[str]:
    """Complaints about a stored alias (a tied head) that is not equal to its original.

    Sources that are known by their shapes alone (`formats.abstract`) have no numbers to compare.
    """
    if tuple(copy.shape) != tuple(original.shape):
        expected = f"expected {list(original.shape)} as {original_name}"
        return [f"{alias} has shape {list(copy.shape)}, {expected}"]
    a, b = copy.read(), original.read()
    if a is None or b is None or np.array_equal(a, b):
        return []
    return [f"{alias} differs from {original_name}, though the config says that they are tied"]


def reader(
    rule: Rule, source: Mapping[str, LazyArray], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    """A function that reads one target, one layer at a time into one array."""

    def read() -> np.ndarray:
        out = np.empty(shape, dtype)
        for index in indices(rule, shape):
            layers = [source[name].read() for name in rule.names(index)]
            out[index] = rule.transform.forward(*layers, shape=shape[len(index) :])
        return out

    return read


def unplan(table: Table, read: Callable[[str], np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """The inverse of `plan`: names and values of the source tensors of a part, aliases included.

    read: returns one parameter by its path; one of them is held at a time.
    """
    copies = {original: alias for alias, original in table.aliases.items()}
    for rule in table.rules:
        value = read(rule.target)
        for index in indices(rule, value.shape):
            tensors = rule.transform.backward(value[index])
            for name, tensor in zip(rule.names(index), tensors, strict=True):
                tensor = np.ascontiguousarray(tensor)
                yield name, tensor
                if name in copies:
                    yield copies[name], tensor

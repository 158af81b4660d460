"""The one converter: a table of rules maps source tensors to our stacked parameters, and back.

A rule names one target parameter and the source tensors it is made of. `{i}` and `{j}` in a source name run over the
leading (layer) axes of the target. The plan is made from shapes alone and is loud: a source tensor nobody uses, a target
nobody sets and every wrong shape are collected and reported at once, before a single number is read.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import jax
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten


class ConversionError(ValueError):
    """The source does not fit the table; the message lists every complaint."""


class Source(Protocol):
    """A tensor that is not read yet: its shape and dtype are known, `read` brings the numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Transform:
    """`forward(*sources, shape)` gives one layer's target of that shape; `backward(target)` gives its sources back.

    Both use only `reshape`, `transpose` and arithmetic, so they run on arrays and on abstract shapes alike.
    """

    forward: Callable[..., np.ndarray]
    backward: Callable[[np.ndarray], tuple]


same = Transform(lambda x, shape: x, lambda y: (y,))
flat = Transform(lambda x, shape: x.reshape(shape), lambda y: (y.reshape(-1),))


def kernel(in_dims: int = 1) -> Transform:
    """torch Linear weight [out, in] <-> kernel [in..., out...], the first `in_dims` axes being inputs."""

    def backward(y):
        rows = int(np.prod(y.shape[:in_dims]))
        return (y.reshape(rows, -1).transpose(),)

    return Transform(lambda x, shape: x.transpose().reshape(shape), backward)


# torch Conv1d weight [out, in, K] <-> kernel [K, in, out]
conv = Transform(lambda x, shape: x.transpose(2, 1, 0), lambda y: (y.transpose(2, 1, 0),))


@dataclass(frozen=True)
class Rule:
    """`target` (dotted path) is made of `sources` (name templates) by `transform`; without sources it is generated."""

    sources: tuple[str, ...] | str
    target: str
    transform: Transform = same

    def names(self, index: tuple[int, ...]) -> tuple[str, ...]:
        sources = (self.sources,) if isinstance(self.sources, str) else self.sources
        return tuple(s.format(**dict(zip("ijk", index, strict=False))) for s in sources)

    @property
    def stacked_axes(self) -> int:
        first = self.sources if isinstance(self.sources, str) else "".join(self.sources[:1])
        return sum("{" + letter + "}" in first for letter in "ijk")


@dataclass(frozen=True)
class Table:
    """Rules of one part; `aliases` are optional copies that must agree; `dropped` are name patterns not needed, with why."""

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    def at(self, source: str = "", target: str = "") -> "Table":
        """The same table with prefixes in front of every source and target name."""
        rename = lambda names: (
            source + names if isinstance(names, str) else tuple(source + n for n in names)
        )  # noqa: E731
        return Table(
            tuple(Rule(rename(r.sources), target + r.target, r.transform) for r in self.rules),
            {source + a: source + b for a, b in self.aliases.items()},
            {re.escape(source) + p: why for p, why in self.dropped.items()},
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


def plan(table: Table, source: Mapping[str, Source], target: Mapping, where: str) -> dict:
    """Check a part completely and return its parameter tree with `LazyArray` leaves.

    source: name -> unread tensor, only this part's names. target: nested dict of ShapeDtypeStruct. where: the file or
    directory, for messages. Raises ConversionError with every complaint.
    """
    leaves, unused, complaints, planned = flatten(target), dict.fromkeys(source), [], {}
    for rule in table.rules:
        if rule.target not in leaves:
            complaints.append(f"the table sets {rule.target}, which the model does not have")
            continue
        shape = leaves[rule.target].shape
        expected = source_shapes(rule, shape)
        dtypes, faults = set(), len(complaints)
        for index in indices(rule, shape):
            for name, want in zip(rule.names(index), expected, strict=True):
                unused.pop(name, None)
                if name not in source:
                    complaints.append(f"missing {name} (shape {list(want)})")
                elif tuple(source[name].shape) != want:
                    complaints.append(
                        f"{name} has shape {list(source[name].shape)}, expected {list(want)}"
                    )
                else:
                    dtypes.add(np.dtype(source[name].dtype))
        if len(complaints) == faults:
            dtype = (
                np.result_type(*dtypes)
                if len(dtypes) > 1
                else next(iter(dtypes), np.dtype(np.float32))
            )
            planned[rule.target] = LazyArray(shape, dtype, reader(rule, source, shape, dtype))
    set_here = {rule.target for rule in table.rules}
    complaints += [f"nothing in the table sets {path}" for path in leaves if path not in set_here]
    for alias, original in table.aliases.items():
        if unused.pop(alias, "absent") is None and original in source:
            complaints += compare(alias, source[alias], original, source[original])
    complaints += [
        f"unexpected {name}"
        for name in unused
        if not any(re.fullmatch(p, name) for p in table.dropped)
    ]
    if complaints:
        raise ConversionError(f"{where}: " + summary(complaints))
    return jax.tree.unflatten(jax.tree.structure(target), [planned[path] for path in leaves])


def summary(complaints: list[str], shown: int = 20) -> str:
    """All complaints in one line, the first `shown` in full."""
    rest = f"; and {len(complaints) - shown} more" if len(complaints) > shown else ""
    count = "1 tensor does" if len(complaints) == 1 else f"{len(complaints)} tensors do"
    return f"{count} not fit: " + "; ".join(complaints[:shown]) + rest


def compare(alias: str, copy: Source, original_name: str, original: Source) -> list[str]:
    """Complaints about a stored alias (a tied head) that is not bit-equal to its original; abstract sources have no numbers."""
    if tuple(copy.shape) != tuple(original.shape):
        return [
            f"{alias} has shape {list(copy.shape)}, expected {list(original.shape)} as {original_name}"
        ]
    a, b = copy.read(), original.read()
    if a is None or b is None or np.array_equal(a, b):
        return []
    return [f"{alias} differs from {original_name}, though the config says that they are tied"]


def reader(
    rule: Rule, source: Mapping[str, Source], shape: tuple[int, ...], dtype
) -> Callable[[], np.ndarray]:
    """A function that reads one target: a layer at a time into one array, nothing else is held."""

    def read() -> np.ndarray:
        out = np.empty(shape, dtype)
        for index in indices(rule, shape):
            layers = [source[name].read() for name in rule.names(index)]
            out[index] = rule.transform.forward(*layers, shape=shape[len(index) :])
        return out

    return read


def unplan(table: Table, read: Callable[[str], np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """What `plan` reads, written back: the source tensors of a part, aliases included. `read` brings one parameter by path."""
    copies = {original: alias for alias, original in table.aliases.items()}
    for rule in table.rules:
        value = read(rule.target)
        for index in indices(rule, value.shape):
            for name, tensor in zip(
                rule.names(index), rule.transform.backward(value[index]), strict=True
            ):
                tensor = np.ascontiguousarray(tensor)
                yield name, tensor
                if name in copies:
                    yield copies[name], tensor

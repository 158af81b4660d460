"""One mesh, `(replica, fsdp, tensor)`, and one table from the logical axes of arrays to the axes of the mesh.

One device is a 1 x 1 x 1 mesh, so there is one code path. An axis that the mesh does not divide (2 key/value heads over a tensor
axis of 8; the speech LM's 158227 tokens, a prime) is held whole by every device of that axis instead of being refused.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "fsdp", "tensor")


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. What is not named here (head sizes, layers, time) is not sharded.

    Parameters are cut over `fsdp` along their width and over `tensor` along everything wide; activations along their rows.
    """

    batch: tuple[str, ...] = ("replica", "fsdp")
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    hidden: tuple[str, ...] = ("tensor",)
    vocabulary: tuple[str, ...] = ("tensor",)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """Where an array goes whose last dimensions have these logical axes; those before them (stacked layers) are not cut."""
        axes, found, taken = (None,) * (len(shape) - len(axes)) + tuple(axes), [], set()
        for axis, size in zip(axes, shape, strict=True):
            wanted = tuple(
                name
                for name in (getattr(self, axis, ()) if axis else ())
                if name not in taken and mesh.shape[name] > 1
            )
            fits = wanted and size % math.prod(mesh.shape[name] for name in wanted) == 0
            taken |= set(wanted if fits else ())
            found.append(wanted if fits else None)
        return PartitionSpec(*found)

    def sharding(
        self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh
    ) -> NamedSharding:
        return NamedSharding(mesh, self.spec(axes, shape, mesh))


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over devices (default: all there are); one size may be -1, the rest of them. Raises ValueError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [replica, fsdp, tensor]
    asked = " x ".join(map(str, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh {asked} (replica x fsdp x tensor): expected positive sizes, one of which may be -1, the rest of the devices"
        )
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        wanted = (
            "sizes that divide them"
            if -1 in sizes
            else "sizes that make as many, or -1 for one of them"
        )
        raise ValueError(
            f"mesh {asked} (replica x fsdp x tensor) does not fit the {len(devices)} devices there are; give {wanted}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices as one writes it: "tensor=8", "replica=2,tensor=4". Without `fsdp`, that is the rest of the devices."""
    try:
        sizes = {
            name.strip(): int(size) for name, size in (pair.split("=") for pair in text.split(","))
        }
    except ValueError:
        sizes = {}
    if not sizes or set(sizes) - set(AXES):
        raise ValueError(
            f"mesh {text!r} is not understood, expected sizes of {', '.join(AXES)}, as in fsdp=2,tensor=4"
        )
    return make_mesh(**sizes, devices=devices)


def mesh_of(params: Mapping) -> Mesh:
    """The mesh that parameters lie on."""
    where = jax.tree.leaves(params)[0].sharding
    return (
        where.mesh
        if isinstance(where, NamedSharding)
        else make_mesh(devices=list(where.device_set))
    )


def check(mesh: Mesh, width: int, hidden: int) -> None:
    """Raise ValueError if a mesh would leave a language model of this width whole, where it was meant to be cut."""
    for axis, cut, size in (("fsdp", "width", width), ("tensor", "hidden size", hidden)):
        if size % mesh.shape[axis]:
            fitting = [
                str(n) for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0
            ]
            raise ValueError(
                f"a mesh with {axis}={mesh.shape[axis]} does not divide the LLM's {cut} of {size}; {', '.join(fitting)} would"
            )


_rules: ContextVar[Rules | None] = ContextVar("rules", default=None)


@contextlib.contextmanager
def _by(rules: Rules | None):
    token = _rules.set(rules or Rules())
    try:
        yield
    finally:
        _rules.reset(token)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules | None = None):
    """Around calls of jitted functions: `constrain` acts in what is traced within this block."""
    with _by(rules), jax.set_mesh(mesh):
        yield


def within(mesh: Mesh, function: Callable, rules: Rules | None = None) -> Callable:
    """A function for jax.jit in which `constrain` acts, wherever it is called from."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with _by(rules), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Say how an activation is cut, by the logical axes of its dimensions. Does nothing outside `use` and `within` or on one device."""
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes, x.shape, mesh))


def of_params(state: nnx.State, mesh: Mesh, rules: Rules | None = None) -> dict:
    """The shardings of (abstract) parameters, as their nested dict."""
    rules = rules or Rules()

    def of(leaf: nnx.Variable) -> nnx.Variable:
        value = leaf.get_value()
        return leaf.replace(rules.sharding(leaf.get_metadata("axes"), value.shape, mesh))

    return nnx.to_pure_dict(
        jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def of_state(state, mesh: Mesh, rules: Rules | None = None):
    """The shardings of what lies between two steps (a tree of shapes). Rows come first in an array, unless its class has `axes`."""
    rules = rules or Rules()

    def of(node):
        axes = getattr(node, "axes", None)
        return jax.tree.map(
            lambda leaf: rules.sharding(
                axes or ("batch", *(None,) * (leaf.ndim - 1)), leaf.shape, mesh
            ),
            node,
        )

    return jax.tree.map(of, state, is_leaf=lambda node: hasattr(node, "axes"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())

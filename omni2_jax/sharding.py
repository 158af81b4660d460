"""One mesh, `(replica, fsdp, tensor)`, and one table from logical array axes to mesh axes.

One device is a 1 x 1 x 1 mesh, so there is one code path. Where a mesh axis does not divide an
array's axis (2 key/value heads over a tensor axis of 8; the speech LM's 158227 tokens, a prime),
every device of it holds that axis whole.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "fsdp", "tensor")
# Logical axis -> mesh axes. Axes that are missing here (head sizes, layers, time) are not sharded.
# Parameters are sharded over `fsdp` along their width and over `tensor` along everything wide;
# activations along their rows.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The partition of an array whose last dimensions have these logical axes.

    Dimensions before them (stacked layers) are not sharded, nor are those that the mesh does not
    divide. A mesh axis shards at most one dimension, the first that asks for it.
    """
    dimensions, used = [], set()
    for axis, size in zip((None,) * (len(shape) - len(axes)) + tuple(axes), shape, strict=True):
        names = tuple(
            name for name in RULES.get(axis or "", ()) if name not in used and mesh.shape[name] > 1
        )
        if not names or size % math.prod(mesh.shape[name] for name in names):
            dimensions.append(None)
            continue
        used.update(names)
        dimensions.append(names)
    return PartitionSpec(*dimensions)


def sharding_of(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """`partition` on its mesh."""
    return NamedSharding(mesh, partition(axes, shape, mesh))


def row_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of arrays along their first axis, the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


# ---- meshes ----


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over `devices` (jax.Device; default: all). One size may be -1: the rest of them.

    Raises ValueError if the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [replica, fsdp, tensor]
    requested = f"mesh {' x '.join(map(str, sizes))} (replica x fsdp x tensor)"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"{requested}: expected positive sizes, one of which may be -1, the rest of the devices"
        )
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        hint = "sizes that make as many, or -1 for one of them"
        if -1 in sizes:
            hint = "sizes that divide them"
        raise ValueError(
            f"{requested} does not fit the {len(devices)} devices there are; give {hint}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def parse_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh written as "tensor=8" or "replica=2,tensor=4", over `devices` (default: all).

    Without `fsdp`, that axis takes the rest of the devices. Raises ValueError if the text is not
    understood or the sizes do not fit the devices.
    """
    try:
        sizes = {
            name.strip(): int(size) for name, size in (pair.split("=") for pair in text.split(","))
        }
    except ValueError:
        sizes = {}
    if not sizes or set(sizes) - set(AXES):
        raise ValueError(
            f"mesh {text!r} is not understood, expected sizes of {', '.join(AXES)},"
            " as in fsdp=2,tensor=4"
        )
    return make_mesh(**sizes, devices=devices)


def mesh_of(params: Mapping) -> Any:
    """The mesh (abstract for abstract parameters) that parameters lie on.

    For parameters without one it is a mesh of their devices.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    return make_mesh(devices=list(sharding.device_set))


def check(mesh: Mesh | AbstractMesh, width: int, hidden: int) -> None:
    """Check that a mesh divides a language model of this width and hidden size.

    Raises ValueError otherwise: the large parameters would lie whole on every device.
    """
    for axis, name, size in (("fsdp", "width", width), ("tensor", "hidden size", hidden)):
        if size % mesh.shape[axis]:
            fitting = [
                str(n) for n in range(1, mesh.size + 1) if mesh.size % n == 0 and size % n == 0
            ]
            raise ValueError(
                f"a mesh with {axis}={mesh.shape[axis]} does not divide the LLM's {name} of {size};"
                f" {', '.join(fitting)} would"
            )


def check_rows(mesh: Mesh | AbstractMesh, batch: int, microbatches: int = 1) -> None:
    """Check that a mesh divides the rows of each microbatch.

    Raises ValueError with a batch that fits.
    """
    rows, count = batch // microbatches, math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if rows % count:
        raise ValueError(
            f"{rows} rows (batch {batch} in {microbatches} microbatches) cannot be cut over the"
            f" {count} devices of the mesh's replica and fsdp axes;"
            f" a batch of {count * microbatches * -(-rows // count)} can"
        )


# ---- activations ----

_active: ContextVar[bool] = ContextVar("active", default=False)


@contextlib.contextmanager
def _activated() -> Iterator[None]:
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """A block for calls of jitted functions: in what they trace, `constrain` takes effect."""
    with _activated(), jax.set_mesh(mesh):
        yield


def within(mesh: Mesh, function: Callable) -> Callable:
    """A function for jax.jit in which `constrain` takes effect, wherever it is called from."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with _activated(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation by the logical axes of its dimensions.

    It returns x unchanged outside `use` and `within`, and on one device.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def in_order(x: jax.Array) -> jax.Array:
    """Constrain the layout of an activation: its axes lie in memory in their order.

    It returns x unchanged where several devices share it: XLA would gather all of it first.
    """
    if _mesh_in_use() is not None:
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _mesh_in_use() -> AbstractMesh | None:
    """The mesh of a trace within `use` or `within`; None of one device, and outside of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if not _active.get() or mesh.empty or mesh.size == 1 else mesh


# ---- parameters and states ----


def of_params(state: nnx.State, mesh: Mesh | AbstractMesh) -> dict:
    """The shardings of (abstract) parameters, as their nested dict."""

    def with_sharding(leaf: nnx.Variable) -> nnx.Variable:
        axes, shape = leaf.get_metadata("axes"), leaf.get_value().shape
        return leaf.replace(sharding_of(axes, shape, mesh))

    return nnx.to_pure_dict(
        jax.tree.map(with_sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def of_state(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of a carried state (a tree of shapes).

    Axis 0 of an array is the batch, unless the class of the array's dataclass defines `axes`: the
    logical axes of the last dimensions of each of its arrays (`KVCache`).
    """

    def with_sharding(node: Any) -> Any:
        axes = getattr(node, "axes", None)

        def leaf_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            by_rows = ("batch", *(None,) * (leaf.ndim - 1))
            return sharding_of(axes or by_rows, leaf.shape, mesh)

        return jax.tree.map(leaf_sharding, node)

    return jax.tree.map(with_sharding, state, is_leaf=lambda node: hasattr(node, "axes"))

"""Layers of one kind, one after the other: stacked for a scan, or listed and unrolled."""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import freed

Array = jax.Array

REMAT = {  # what a layer keeps from the forward pass for the backward pass; the rest is recomputed
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` copies of a module as one with stacked parameters [count, ...]; `scan` runs it."""
    layers: Any = nnx.vmap(build, in_axes=0, out_axes=0)(rngs.split(count))
    layers.stacked = True
    return layers


def unstack(layers: nnx.Module, donate: bool = False) -> nnx.List:
    """Stacked layers as a list of layers with parameters of their own; `scan` then unrolls them.

    On a CPU this is twice as fast, because a scan copies every layer's weights before it uses them,
    but it is slow to compile. donate: see `freed`.
    """
    graph, params = nnx.split(layers)
    leaves, tree = jax.tree.flatten(params)

    def layer(*leaves: Array) -> nnx.Module:
        module = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        del module.stacked  # it is one layer
        return module

    # jnp.unstack has a cheaper gradient than one slice for each layer.
    return nnx.List(map(layer, *(freed([leaf], jnp.unstack(leaf), donate) for leaf in leaves)))


def unstack_all(module: nnx.Module) -> None:
    """Replace all stacked layers in a module, and in its layers, by lists (`unstack`)."""
    for name, child in list(vars(module).items()):
        if hasattr(child, "stacked"):
            child = unstack(child)
            setattr(module, name, child)
        for part in child if isinstance(child, nnx.List) else [child]:
            if isinstance(part, nnx.Module):
                unstack_all(part)


def is_unrolled(layers: nnx.Module) -> TypeGuard[nnx.List]:
    """Whether layers are listed (`unstack`), and so run one by one; else they are stacked."""
    return isinstance(layers, nnx.List)


def scan(
    layers: nnx.Module, body: Callable, carry: Any, xs: Any = None, remat: str = "none"
) -> tuple[Any, Any]:
    """Run layers in order: `body(layer, carry, x) -> (carry, y)`.

    Returns the last carry and the stacked ys.

    Stacked layers are compiled once, as a scan; listed ones (`unstack`) are unrolled.
    xs: one slice for each layer, on a leading axis. remat: a key of REMAT, for stacked layers only.
    """
    if is_unrolled(layers):
        return unrolled(layers, body, carry, xs)
    graph, params = nnx.split(layers)

    def step(carry: Any, slices: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_params, x = slices
        return body(nnx.merge(graph, layer_params), carry, x)

    if remat != "none":
        # CSE cannot undo the checkpoint inside lax.scan, so prevent_cse=False is safe.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs))


def unrolled(layers: nnx.List, body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`scan` over listed layers, as a Python loop."""

    def slice_of(index: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], xs)

    ys = []
    for index, layer in enumerate(layers):
        carry, y = body(layer, carry, slice_of(index))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

"""Linear layers of the same input as one matrix: on a GPU each matmul is a kernel launch."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import freed

Array = jax.Array


class Fusing(nnx.Module):
    """A module with linear layers of the same input, which `fuse` makes one matrix for serving.

    same_input: the names of these layers. fused_axis: the axis of their outputs from the end, along
    which the matrices are joined.
    """

    same_input: ClassVar[tuple[str, ...]]
    fused_axis: ClassVar[int] = -1

    def fuse(self, donate: bool = False) -> None:
        """Join the layers, unless they have low-rank updates beside them. donate: see `freed`."""
        layers = [getattr(self, name) for name in self.same_input]
        if any(layer.low is not None for layer in layers):
            return
        graph, state = nnx.split(layers[0])
        values = [nnx.to_pure_dict(nnx.state(layer)) for layer in layers]

        def join(*leaves: Array) -> Array:
            return freed(leaves, jnp.concatenate(leaves, self.fused_axis), donate)

        joined = jax.tree.map(join, *values)
        nnx.replace_by_pure_dict(state, joined)
        self.fused = nnx.merge(graph, state)
        self.sizes = tuple(value["kernel"].shape[self.fused_axis] for value in values)
        for name in self.same_input:
            setattr(self, name, None)

    def same_inputs(self, x: Array) -> list[Array]:
        """x [..., D] -> the outputs of all of these layers, in the order of `same_input`."""
        fused = getattr(self, "fused", None)
        if fused is None:
            return [getattr(self, name)(x) for name in self.same_input]
        ends = list(itertools.accumulate(self.sizes))[:-1]
        return jnp.split(fused(x), ends, self.fused_axis)

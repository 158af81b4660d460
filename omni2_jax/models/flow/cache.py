"""What the flow keeps of finished frames: keys and values for attention, inputs for convolutions.

One convention in this package: a module is called with (x, ..., window, cache) and returns
(y, cache). For a whole utterance at once, as in training, both are None (NO_CACHE).
B rows, T frames of the window, S places of the ring, N heads, H head size, C channels, L layers.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional, TypeVar

import jax
import jax.numpy as jnp

from omni2_jax.sharding import in_order

Array = jax.Array

T = TypeVar("T")
if TYPE_CHECKING:
    # A cache that comes in also comes out. A type checker takes it as present, since otherwise
    # every use would have to test for None.
    Maybe = Annotated[T, "or None"]
else:
    Maybe = Optional

NO_CACHE: Any = None  # for whole utterances


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingKVCache:
    """Keys and values of the last S frames, for all layers.

    The places 0 to S - 1 form a ring: new frames overwrite the oldest ones. The caller chooses the
    place of each frame (Window.ring_start) and knows which frame is where (FlowState.cached_units).

    Key and value are side by side in one array, since a TPU pads the last axis to 128: keys of 64
    alone would take twice the space, or be kept in another order and copied in every call.

    Blocks that run in a scan have one array for all layers and passes over them (Euler steps), one
    pass after the other. Blocks that are listed have an array each, which holds all passes.
    """

    axes: ClassVar = ("batch", "heads", None, None)  # logical axes of one layer
    # [passes x L, B, N, S, 2H], or of each layer [passes, B, N, S, 2H]
    pairs: Array | tuple[Array, ...]
    index: Array | None = None  # [] along the first axis; None between steps
    layer: int = field(default=0, metadata={"static": True})  # in the tuple

    @classmethod
    def empty(
        cls,
        layers: int,
        passes: int,
        shape: tuple[int, int, int, int],
        dtype,
        unrolled: bool = False,
    ) -> "RingKVCache":
        """A cache for `passes` passes over so many layers.

        shape: batch, heads, capacity in frames, head size.
        """
        *rows, head_size = shape
        if not unrolled:
            return cls(jnp.zeros((passes * layers, *rows, 2 * head_size), dtype))
        return cls(tuple(jnp.zeros((passes, *rows, 2 * head_size), dtype) for _ in range(layers)))

    def of_pass(self, number: Array, layers: int) -> "RingKVCache":
        """The same cache, at the first of `layers` layers of a pass."""
        stacked = not isinstance(self.pairs, tuple)
        return dataclasses.replace(self, index=number * layers if stacked else number, layer=0)

    def between_steps(self) -> "RingKVCache":
        """The same cache, at no layer."""
        return dataclasses.replace(self, index=None, layer=0)

    def next_layer(self) -> "RingKVCache":
        """The same cache at the layer after this one."""
        assert self.index is not None
        if isinstance(self.pairs, tuple):
            return dataclasses.replace(self, layer=self.layer + 1)
        return dataclasses.replace(self, index=self.index + 1)

    @property
    def array(self) -> Array:
        """The array that holds the layer."""
        return self.pairs[self.layer] if isinstance(self.pairs, tuple) else self.pairs

    def write(self, start: Array, k: Array, v: Array) -> "RingKVCache":
        """Put k and v [B, T, N, H] at places start[b], start[b] + 1, ...

        A row whose places would reach beyond S is not written at all.
        """
        assert self.index is not None
        pairs = jnp.concatenate([k, v], -1).swapaxes(1, 2).astype(self.array.dtype)
        indices = jnp.stack([jnp.full_like(start, self.index), jnp.arange(len(start)), start], -1)
        # Scatter one contiguous window per row. A scatter frame by frame would force a layout with
        # heads behind time, which attention reads slowly.
        window = jax.lax.ScatterDimensionNumbers(
            (1, 2, 3), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 3)
        )
        drop = jax.lax.GatherScatterMode.FILL_OR_DROP
        array = jax.lax.scatter(self.array, indices, pairs, window, unique_indices=True, mode=drop)
        if not isinstance(self.pairs, tuple):
            return dataclasses.replace(self, pairs=array)
        array = in_order(array)  # else XLA may transpose all of it before and after every step
        before, after = self.pairs[: self.layer], self.pairs[self.layer + 1 :]
        return dataclasses.replace(self, pairs=(*before, array, *after))

    def read(self, size: int, dtype) -> tuple[Array, Array]:
        """Keys and values of the first `size` places, each [B, N, size, H]."""
        assert self.index is not None
        index, (batch, heads, _, width) = self.index, self.array.shape[1:]

        def half(first: int) -> Array:
            start, shape = (index, 0, 0, 0, first), (1, batch, heads, size, width // 2)
            return jax.lax.dynamic_slice(self.array, start, shape)[0].astype(dtype)

        return half(0), half(width // 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvCache:
    """The inputs of a causal convolution of kernel size K that lie before its next window."""

    axes: ClassVar = ("batch", None, None)  # axes before these are layers and Euler steps
    inputs: Array  # [..., B, K - 1, C]

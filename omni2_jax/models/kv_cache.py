"""Keys and values of a decoder's past, for all layers at once. L layers, B batch, S cache time, K kv heads, H head size.

A row's past is contiguous from position 0, so position p lives in slot p and a query at p sees slots 0..p: rows of
different lengths need no padding on the left, and a slot's length is the only bookkeeping.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from omni2_jax.config import DecoderConfig
from omni2_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys, values: [L, B, S, K, H]."""

    axes: ClassVar = ("batch", None, "kv_heads", None)  # of each layer
    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(
        cls, config: DecoderConfig, batch: int, capacity: int, dtype=jnp.float32
    ) -> "KVCache":
        shape = (config.layers, batch, capacity, config.kv_heads, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def write(
        self, layer: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
    ) -> "KVCache":
        """Put keys and values [B, T, K, H] of one layer at positions [B, T]; negative positions (padding) are not written."""
        rows = jnp.arange(positions.shape[0])[:, None]
        slots = jnp.where(positions < 0, self.capacity, positions)  # out of bounds, hence dropped
        # Where kv heads are held whole by every device, XLA would cut them all the same, and gather the cache in every call.
        put = lambda old, new: constrain(
            old.at[layer, rows, slots].set(new.astype(old.dtype), mode="drop"), None, *self.axes
        )  # noqa: E731
        return KVCache(put(self.keys, keys), put(self.values, values))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of one layer."""
        return self.keys[layer], self.values[layer]

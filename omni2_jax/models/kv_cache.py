"""Keys and values of a decoder for all layers at once.

L layers, B batch, S cache time, K kv heads, H head size.

A row's positions begin at 0 without gaps, so position p lies at index p of S and a query at p
attends to indices 0 to p: rows of different lengths need no padding on the left, and the length of
a row is all that has to be known of it.
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

    axes: ClassVar = ("batch", None, "kv_heads", None)  # of each layer; see `sharding.of_state`
    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(
        cls, config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype | type = jnp.float32
    ) -> "KVCache":
        """A cache of zeros for `batch` rows of up to `capacity` positions."""
        shape = (config.layers, batch, capacity, config.kv_heads, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        """Positions that fit into a row: S."""
        return self.keys.shape[2]

    def write(
        self, layer: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
    ) -> "KVCache":
        """The cache with keys and values [B, T, K, H] of one layer at positions [B, T].

        Those at negative positions (padding) and beyond the capacity are dropped.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        indices = jnp.where(positions < 0, self.capacity, positions)  # out of bounds, so dropped

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            written = old.at[layer, rows, indices].set(new.astype(old.dtype), mode="drop")
            # Without it XLA shards kv heads that every device holds whole, and gathers the cache in
            # every call.
            return constrain(written, None, *self.axes)

        return KVCache(put(self.keys, keys), put(self.values, values))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of one layer."""
        return self.keys[layer], self.values[layer]

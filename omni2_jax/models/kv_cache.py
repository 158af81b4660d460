"""Keys and values of a decoder.

L layers, B batch, T query time, S cache time, N heads, K kv heads, H head size.

A row's positions begin at 0 without gaps, so position p lies at index p of S and a query at p
attends to indices 0 to p: rows of different lengths need no padding on the left, and the length of
a row is all that has to be known of it.

There are two forms, for layers that run in a scan and for layers that are listed
(`models.forms`). Both are pytrees with the same methods; `empty_cache` makes the right one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from omni2_jax.config import DecoderConfig
from omni2_jax.models.layers import MASKED, attention
from omni2_jax.sharding import constrain, in_order

Array = jax.Array

# Attention reads so many eighths of a cache at most, the fewest that hold what is live: each size
# is a program of its own.
EIGHTHS = (2, 3, 4, 6, 8)
FEW_ROWS = 8  # with fewer rows, the cache is small beside the weights, and one size is enough


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys, values: [L, B, S, K, H], of all layers at once."""

    axes: ClassVar = ("batch", None, "kv_heads", None)  # of each layer; see `sharding.of_state`
    slot_axis: ClassVar = 1
    keys: Array
    values: Array

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

    def sizes(self, first: int | None = None) -> tuple[int, ...]:
        """How many positions `attend` may read, ascending. first: see `over_live`."""
        return (self.capacity,)

    def write(self, layer: Array, positions: Array, keys: Array, values: Array) -> "KVCache":
        """The cache with keys and values [B, T, K, H] of one layer at positions [B, T].

        Those at negative positions (padding) and beyond the capacity are dropped.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        indices = jnp.where(positions < 0, self.capacity, positions)  # out of bounds, so dropped

        def put(old: Array, new: Array) -> Array:
            written = old.at[layer, rows, indices].set(new.astype(old.dtype), mode="drop")
            # Without it XLA shards kv heads that every device holds whole, and gathers the cache in
            # every call.
            return constrain(written, None, *self.axes)

        return KVCache(put(self.keys, keys), put(self.values, values))

    def attend(self, layer: Array, q: Array, positions: Array, size: int) -> Array:
        """Queries [B, T, N, H] at positions [B, T] over the first `size` positions of a layer."""
        keys, values = (
            cached[layer][:, :size].astype(q.dtype) for cached in (self.keys, self.values)
        )
        return attention(q, keys, values, visible(positions, size)[:, None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ListedKVCache:
    """pairs: [2, B, K, S, H] of every layer, so that no layer has to be copied out of an array.

    Keys are pairs[0] and values pairs[1], which one kernel writes. Heads come before time, since
    attention reads them one by one; in another order XLA transposes the whole cache before and
    after every loop.
    """

    axes: ClassVar = ("batch", "kv_heads", None, None)
    slot_axis: ClassVar = 1
    pairs: tuple[Array, ...]

    @classmethod
    def empty(
        cls, config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype | type = jnp.float32
    ) -> "ListedKVCache":
        """A cache of zeros for `batch` rows of up to `capacity` positions."""
        shape = (2, batch, config.kv_heads, capacity, config.head_size)
        return cls(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)))

    @property
    def capacity(self) -> int:
        """Positions that fit into a row: S."""
        return self.pairs[0].shape[3]

    def sizes(self, first: int | None = None) -> tuple[int, ...]:
        """How many positions `attend` may read, ascending. first: see `over_live`."""
        if first is not None:
            return (first, self.capacity) if first < self.capacity else (self.capacity,)
        if self.pairs[0].shape[1] < FEW_ROWS:
            return (self.capacity,)
        return tuple(-(-self.capacity * part // EIGHTHS[-1]) for part in EIGHTHS)

    def write(self, layer: int, positions: Array, keys: Array, values: Array) -> "ListedKVCache":
        """The cache with keys and values [B, T, K, H] of one layer; see `KVCache.write`."""
        old = self.pairs[layer]
        new = jnp.stack([keys, values], 2).astype(old.dtype)  # [B, T, 2, K, H]
        put = put_one if positions.size == 1 else put_many
        written = constrain(put(old, positions, new), None, *self.axes)
        return ListedKVCache((*self.pairs[:layer], written, *self.pairs[layer + 1 :]))

    def attend(self, layer: int, q: Array, positions: Array, size: int) -> Array:
        """Queries [B, T, N, H] at positions [B, T] over the first `size` positions of a layer."""
        keys, values = self.pairs[layer][:, :, :, :size].astype(q.dtype)
        # Otherwise XLA gives the whole cache the order that the product below would like best, and
        # transposes it before and after every loop.
        keys = in_order(keys)
        grouped = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[-1])  # [B, T, K, G, H]
        # Not an einsum, which may multiply keys by queries: softmax over the scores [..., S, G]
        # takes a GPU five kernels instead of one.
        over_heads = (((4,), (3,)), ((0, 2), (0, 1)))
        scores = jax.lax.dot_general(grouped, keys, over_heads, preferred_element_type=jnp.float32)
        mask = visible(positions, size)[:, None, :, None]
        scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, MASKED)  # [B, K, T, G, S]
        weights = jax.nn.softmax(scores, -1).astype(q.dtype)
        mixed = jax.lax.dot_general(weights, values, (((4,), (2,)), ((0, 1), (0, 1))))
        return mixed.swapaxes(1, 2).reshape(q.shape)


def put_many(old: Array, positions: Array, new: Array) -> Array:
    """Pairs [2, B, K, S, H] with new [B, T, 2, K, H] at positions [B, T].

    What is outside of 0 to S - 1 is dropped; padding is at -1.
    """
    rows = jnp.arange(len(positions))[:, None]
    indices = jnp.where(positions < 0, old.shape[3], positions)  # out of bounds, so dropped
    return old.at[:, rows, :, indices].set(new, mode="drop")


def put_one(old: Array, positions: Array, new: Array) -> Array:
    """`put_many` of one position of one row, whose scatter XLA would transpose the cache for."""
    position = positions[0, 0]
    update = new.reshape(2, 1, -1, 1, new.shape[-1])  # [2, B, K, T, H]
    before = jax.lax.dynamic_slice_in_dim(old, position, 1, 3)
    inside = (position >= 0) & (position < old.shape[3])
    update = jnp.where(inside, update, before)
    return jax.lax.dynamic_update_slice_in_dim(old, update, position, 3)


Cache = KVCache | ListedKVCache


def visible(positions: Array, size: int) -> Array:
    """Whether a query at positions [B, T] attends to each of the first `size`, [B, T, size]."""
    return jnp.arange(size)[None, None, :] <= positions[:, :, None]


def empty_cache(
    config: DecoderConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype | type = jnp.float32,
    listed: bool = False,
) -> Cache:
    """A cache of zeros for `batch` rows of up to `capacity` positions, of listed layers or not."""
    kind = ListedKVCache if listed else KVCache
    return kind.empty(config, batch, capacity, dtype)


def over_live(
    cache: Cache,
    longest: Array,
    run: Callable[[int, Any], Any],
    carry: Any,
    first: int | None = None,
) -> Any:
    """`run(size, carry)` with the smallest of the cache's sizes that holds `longest` [] positions.

    first: if given, there are two sizes, this one and the whole cache. run: a function to a new
    carry of the same shapes. There is a loop of one or no iteration for each size: unlike a
    conditional, it updates a cache in place. The sizes are in the names of the scopes, where
    benchmarks.aot reads them.
    """
    sizes = cache.sizes(first)
    if len(sizes) == 1:
        return run(sizes[0], carry)
    smallest = jnp.sum(longest > jnp.array(sizes[:-1]))
    for index, size in enumerate(sizes):
        below = (0, *sizes)[index]
        with jax.named_scope(f"live_{below + 1}_to_{size}"):
            iterations = (smallest == index).astype(jnp.int32)
            body = functools.partial(run, size)
            carry = jax.lax.fori_loop(0, iterations, lambda _, carry, body=body: body(carry), carry)
    return carry

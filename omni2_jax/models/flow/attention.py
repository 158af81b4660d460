"""Attention over a window's own frames or over a RingKVCache, and the loop over stacked blocks.

B rows, T frames of the window, S keys, N heads, H head size, C channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.flow.cache import Maybe, RingKVCache
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.stacks import scan
from omni2_jax.sharding import constrain

Array = jax.Array


def softmax_attention(q: Array, keys: Array, values: Array, bias: Array) -> Array:
    """q [B, T, N, H] over keys and values [B, N, S, H] -> [B, T, N, H].

    The bias may have more than S columns; the first S are used. Scores and softmax are float32.
    Heads come before time in keys and values, since what is read often is read head by head.
    """
    scores = jnp.einsum("BTNH,BNSH->BNTS", q, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias[..., : keys.shape[2]], -1).astype(values.dtype)
    # Heads go behind time only at the end: as the einsum's output it doubles the time on a CPU.
    return jnp.einsum("BNTS,BNSH->BNTH", weights, values).swapaxes(1, 2)


def heads_first(q: Array, keys: Array, values: Array, bias: Array) -> Array:
    """The same as `softmax_attention`, but the heads come first in the result, [N, B, T, H]."""
    q, keys, values = q.transpose(2, 0, 1, 3), keys.swapaxes(0, 1), values.swapaxes(0, 1)
    batch = (0, 1), (0, 1)
    over_head = ((3,), (3,)), batch
    scores = jax.lax.dot_general(q, keys, over_head, preferred_element_type=jnp.float32)
    bias = bias[..., : keys.shape[2]].swapaxes(0, 1)
    weights = jax.nn.softmax(scores + bias, -1).astype(values.dtype)
    return jax.lax.dot_general(weights, values, (((3,), (2,)), batch))


Attend = Callable[[Array, Array, Array, Array], Array]


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    window: Window,
    cache: Maybe[RingKVCache],
    attend: Attend = softmax_attention,
) -> tuple[Array, Maybe[RingKVCache]]:
    """Softmax attention of scaled q over k and v, each [B, T, N, H] -> (its result, cache).

    attend: of queries, keys, values and bias; by default the result is [B, T, N, H].
    With a cache, k and v are written to the layer at which the cache is (its `index` and `layer`),
    and q attends to all of that layer. bias broadcasts to [B, N, T, S]. Of the S places only the
    first few are read that hold every visible key: the smallest of window.read_sizes that does.
    """
    if cache is None:
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), bias), cache
    assert window.ring_start is not None
    cache = cache.write(window.ring_start, k, v)

    def attend_first(size: int) -> Array:
        return attend(q, *cache.read(size, q.dtype), bias)

    smallest = jnp.sum(window.num_keys.max() > jnp.array(window.read_sizes[:-1]))
    branches = [functools.partial(attend_first, size) for size in window.read_sizes]
    return jax.lax.switch(smallest, branches), cache


def run_blocks(
    blocks: nnx.Module,
    x: Array,
    window: Window,
    cache: Maybe[RingKVCache],
    remat: str = "full",
) -> tuple[Array, Maybe[RingKVCache]]:
    """x [B, T, C] through stacked transformer blocks -> ([B, T, C], cache).

    The cache is at the layer of the first block, and comes back at the layer after the last one.
    remat: what training, which has no cache, keeps of a block, see `stacks.scan`. By default its
    attention is computed again in the backward pass: saving all of its activations takes 115 GB for
    16 replies of 20 s.
    """

    def body(block, carry, _):
        x, cache = block(carry[0], window, carry[1])
        x = constrain(x, "batch", None, None)
        return (x, cache and cache.next_layer()), None

    return scan(blocks, body, (x, cache), remat=remat if cache is None else "none")[0]

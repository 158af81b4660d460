"""Choosing the next token, every row with its own settings and key. B batch, V vocabulary.

The order is that of Hugging Face's generate: repetition penalty, temperature, top-k, top-p.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings per row, each [B]. temperature 0 = greedy; top_k 0 and top_p 1 = off; repetition_penalty 1 = off."""

    temperature: Array
    top_p: Array
    top_k: Array
    repetition_penalty: Array

    @classmethod
    def of(
        cls, batch: int = 1, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0
    ) -> "Sampling":
        fill = lambda value, dtype: jnp.full(batch, value, dtype)  # noqa: E731
        return cls(
            fill(temperature, jnp.float32),
            fill(top_p, jnp.float32),
            fill(top_k, jnp.int32),
            fill(repetition_penalty, jnp.float32),
        )


def penalize(logits: Array, seen: Array, penalty: Array) -> Array:
    """Make tokens already generated (seen [B, V]) less likely (CTRL): positive logits divided, negative ones multiplied."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Put -inf outside the top-k and the smallest set whose probability reaches top-p; ties with the last one are kept.

    Nothing is sorted: a vocabulary that is cut over devices stays so, and a TPU's compiler takes a minute for a sort of this size.
    """
    keys, most = ordered(logits), jnp.where(top_k > 0, top_k, logits.shape[-1])
    above = lambda key: keys > key[:, None]  # noqa: E731
    in_k = keys >= least(lambda key: jnp.sum(above(key), -1) < most)[:, None]
    probability = jax.nn.softmax(jnp.where(in_k, logits, -jnp.inf), axis=-1)
    share = jnp.where(
        top_p < 1, jnp.maximum(top_p, 1e-30), jnp.inf
    )  # the likeliest token stays even where it is 0
    least_p = least(lambda key: jnp.sum(jnp.where(above(key), probability, 0), -1) < share)
    return jnp.where(in_k & (keys >= least_p[:, None]), logits, -jnp.inf)


def ordered(x: Array) -> Array:
    """float32 as uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def least(enough: Callable[[Array], Array]) -> Array:
    """The least uint32 of each row for which `enough` holds, as it does for all above it. Its bits are found one after the other."""

    def bit(i: Array, key: Array) -> Array:
        lower = key & ~(jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(lower), lower, key)

    shape = jax.eval_shape(enough, jax.ShapeDtypeStruct((1,), jnp.uint32)).shape
    return jax.lax.fori_loop(0, 32, bit, jnp.full(shape, 2**32 - 1, jnp.uint32))


def sample(logits: Array, settings: Sampling, keys: Array) -> Array:
    """float32 logits [B, V] (penalty already applied), one key per row [B] -> token ids [B]."""
    greedy = jnp.argmax(logits, axis=-1)

    def draw(logits):
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        drawn = jax.vmap(jax.random.categorical)(
            keys, truncate(scaled, settings.top_k, settings.top_p)
        )
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda _: greedy, logits)

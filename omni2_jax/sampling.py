"""Choosing the next token, every row with its own settings and key. B batch, V vocabulary.

The order is that of Hugging Face's generate: repetition penalty, temperature, top-k, top-p.
"""

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
    def of(cls, batch: int = 1, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0) -> "Sampling":
        fill = lambda value, dtype: jnp.full(batch, value, dtype)  # noqa: E731
        return cls(fill(temperature, jnp.float32), fill(top_p, jnp.float32), fill(top_k, jnp.int32), fill(repetition_penalty, jnp.float32))


def penalise(logits: Array, seen: Array, penalty: Array) -> Array:
    """Make tokens already generated (seen [B, V]) less likely (CTRL): positive logits divided, negative ones multiplied."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Put -inf outside the top-k and the smallest set whose probability reaches top-p; ties with the last one are kept."""
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    ordered = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ordered)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (ordered > -jnp.inf) & ((before < top_p[:, None]) | (rank == 0))
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample(logits: Array, settings: Sampling, keys: Array) -> Array:
    """float32 logits [B, V] (penalty already applied), one key per row [B] -> token ids [B]."""
    greedy = jnp.argmax(logits, axis=-1)

    def draw(logits):
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        drawn = jax.vmap(jax.random.categorical)(keys, truncate(scaled, settings.top_k, settings.top_p))
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda _: greedy, logits)

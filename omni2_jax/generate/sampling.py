"""Sample the next token of every row, each row with its own settings and key.

B batch (rows), V vocabulary. The order of operations is that of `generate` of Hugging Face's
transformers: repetition penalty, temperature, top-k, top-p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array

# Numbers of all rows. FEW of them are compared with 255 thresholds in as little time as with 15.
# MANY are read once for all thresholds, since they exceed a GPU's cache.
FEW, MANY = 1 << 17, 1 << 22


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Settings of every row, each an array [B]."""

    temperature: Array  # float32; 0 = greedy
    top_p: Array  # float32; 1 = off
    top_k: Array  # int32; 0 = off
    repetition_penalty: Array  # float32; 1 = off

    @classmethod
    def of(
        cls,
        batch: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same settings for `batch` rows. What is not given is off."""
        return cls(
            temperature=jnp.full(batch, temperature, jnp.float32),
            top_p=jnp.full(batch, top_p, jnp.float32),
            top_k=jnp.full(batch, top_k, jnp.int32),
            repetition_penalty=jnp.full(batch, repetition_penalty, jnp.float32),
        )


def penalize(logits: Array, generated_mask: Array, penalty: Array) -> Array:
    """Make tokens that were generated before less likely. Source: CTRL (Keskar et al. 2019), 4.1.

    logits: [B, V]. generated_mask: [B, V], True for those tokens. penalty: [B], 1 = off. Their
    positive logits are divided by the penalty, their negative ones are multiplied by it.
    """
    penalty = penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(generated_mask, penalized, logits)


def truncate(logits: Array, top_k: Array, top_p: Array, bits: int = 1) -> Array:
    """Set the logits of unlikely tokens to -inf.

    logits: [B, V]. What stays are the `top_k` [B] most likely tokens, and of these the smallest
    set whose total probability is at least `top_p` [B]. Tokens as likely as the last one stay too.
    bits: see `smallest_key`; of FEW logits twice as many, if it is not 1.

    Nothing is sorted: a sharded vocabulary stays sharded, and the TPU compiler needs a minute for
    a sort of this size.
    """
    keys = to_ordered_bits(logits)
    if bits > 1 and keys.size <= FEW:
        bits *= 2
    count_limit = jnp.where(top_k > 0, top_k, logits.shape[-1])

    def few_above(thresholds: Array) -> Array:
        return sums_above(1, keys, thresholds) < count_limit[:, None]

    k_threshold = smallest_key(few_above, len(logits), bits)
    in_top_k = keys >= k_threshold[:, None]
    probability = jax.nn.softmax(jnp.where(in_top_k, logits, -jnp.inf), axis=-1)
    # With top_p = 0 the most likely token stays: the sum of nothing (0) is below 1e-30.
    sum_limit = jnp.where(top_p < 1, jnp.maximum(top_p, 1e-30), jnp.inf)

    def little_above(thresholds: Array) -> Array:
        return sums_above(probability, keys, thresholds) < sum_limit[:, None]

    p_threshold = smallest_key(little_above, len(logits), bits)
    return jnp.where(in_top_k & (keys >= p_threshold[:, None]), logits, -jnp.inf)


def to_ordered_bits(x: Array) -> Array:
    """float32 -> uint32 in the same order: a < b exactly if bits(a) < bits(b)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def sums_above(values: Array | int, keys: Array, thresholds: Array) -> Array:
    """The sums of those values [B, V] of every row whose keys [B, V] exceed thresholds [B, n].

    values: an int if all are the same. Returns [B, n].
    """
    if thresholds.shape[1] == 1 or keys.size < MANY:
        above = keys[:, None] > thresholds[:, :, None]
        return jnp.where(above, values if isinstance(values, int) else values[:, None], 0).sum(-1)
    # All sums in one pass, since a GPU's cache does not hold so many numbers for the next one.
    terms = [jnp.where(keys > column[:, None], values, 0) for column in thresholds.T]

    def add(total: Sequence[Array], terms: Sequence[Array]) -> list[Array]:
        return [a + b for a, b in zip(total, terms, strict=True)]

    zeros = [jnp.zeros((), term.dtype) for term in terms]
    return jnp.stack(jax.lax.reduce(terms, zeros, add, [1]), 1)


def smallest_key(holds: Callable[[Array], Array], rows: int, bits: int = 1) -> Array:
    """The smallest uint32 of every row, [B], for which `holds` is True.

    holds: keys [B, n] -> bool [B, n] of each, monotonic: if it is True for a key, it is True for
    all larger ones. rows: B. Each pass tests n = 2^bits - 1 keys at once and so decides `bits` bits
    of the result, the highest ones first. bits: a divisor of 32; the result is the same for all.
    With more than one the few passes are unrolled: a loop takes kernels of its own.
    """
    digits = jnp.arange(2**bits - 1, dtype=jnp.uint32)

    def decide(i: Array, key: Array) -> Array:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        lowest = key & ~(jnp.uint32(2**bits - 1) << shift)
        too_small = ~holds(lowest[:, None] | digits << shift)
        return lowest | jnp.sum(too_small, 1, dtype=jnp.uint32) << shift

    start = jnp.full(rows, 2**32 - 1, jnp.uint32)
    return jax.lax.fori_loop(0, 32 // bits, decide, start, unroll=bits > 1)


@jax.named_scope("sampling")
def sample(logits: Array, settings: Sampling, keys: Array, bits: int = 1) -> Array:
    """Sample one token id for every row -> [B].

    logits: float32 [B, V], after `penalize`. keys: [B], one PRNG key for every row. The repetition
    penalty of `settings` is not applied here. bits: see `truncate`.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw(logits: Array) -> Array:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        truncated = truncate(scaled, settings.top_k, settings.top_p, bits)
        drawn = jax.vmap(jax.random.categorical)(keys, truncated)
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda _: greedy, logits)

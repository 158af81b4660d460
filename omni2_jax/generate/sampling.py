"""Sample the next token of every row, each row with its own settings and key.

B batch (rows), V vocabulary. The order of operations is that of `generate` of Hugging Face's
transformers: repetition penalty, temperature, top-k, top-p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array
Keys = Sequence[Array]  # each [B]: uint32, or bool, whether something holds for them


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
    bits: see `smallest_key`.

    Nothing is sorted: a sharded vocabulary stays sharded, and the TPU compiler needs a minute for
    a sort of this size.
    """
    keys = to_ordered_bits(logits)
    count_limit = jnp.where(top_k > 0, top_k, logits.shape[-1])

    def few_above(thresholds: Keys) -> Keys:
        counts = sums([(keys > key[:, None]).astype(jnp.int32) for key in thresholds])
        return [count < count_limit for count in counts]

    k_threshold = smallest_key(few_above, len(logits), bits)
    in_top_k = keys >= k_threshold[:, None]
    probability = jax.nn.softmax(jnp.where(in_top_k, logits, -jnp.inf), axis=-1)
    # With top_p = 0 the most likely token stays: the sum of nothing (0) is below 1e-30.
    sum_limit = jnp.where(top_p < 1, jnp.maximum(top_p, 1e-30), jnp.inf)

    def little_above(thresholds: Keys) -> Keys:
        masses = sums([jnp.where(keys > key[:, None], probability, 0) for key in thresholds])
        return [mass < sum_limit for mass in masses]

    p_threshold = smallest_key(little_above, len(logits), bits)
    return jnp.where(in_top_k & (keys >= p_threshold[:, None]), logits, -jnp.inf)


def to_ordered_bits(x: Array) -> Array:
    """float32 -> uint32 in the same order: a < b exactly if bits(a) < bits(b)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def sums(arrays: Sequence[Array]) -> Sequence[Array]:
    """The sum of each array over its last axis, of several ones in one kernel of a GPU."""
    if len(arrays) == 1:
        return [jnp.sum(arrays[0], -1)]
    zeros = [jnp.zeros((), array.dtype) for array in arrays]

    def add(total: Sequence[Array], terms: Sequence[Array]) -> list[Array]:
        return [a + b for a, b in zip(total, terms, strict=True)]

    return jax.lax.reduce(list(arrays), zeros, add, [arrays[0].ndim - 1])


def smallest_key(holds: Callable[[Keys], Keys], rows: int, bits: int = 1) -> Array:
    """The smallest uint32 of every row, [B], for which `holds` is True.

    holds: several keys [B] -> bool [B] of each, monotonic: if it is True for a key, it is True for
    all larger ones. rows: B. Each pass tests 2^bits - 1 keys at once and so decides `bits` bits of
    the result, the highest ones first. bits: a divisor of 32; the result is the same for all.
    """
    digits = 2**bits - 1

    def decide(i: Array, key: Array) -> Array:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        lowest = key & ~(jnp.uint32(digits) << shift)
        held = holds([lowest | jnp.uint32(digit) << shift for digit in range(digits)])
        too_small = sum(((~test).astype(jnp.uint32) for test in held), jnp.uint32(0))
        return lowest | too_small << shift

    return jax.lax.fori_loop(0, 32 // bits, decide, jnp.full(rows, 2**32 - 1, jnp.uint32))


@jax.named_scope("sampling")
def sample(logits: Array, settings: Sampling, keys: Array, bits: int = 1) -> Array:
    """Sample one token id for every row -> [B].

    logits: float32 [B, V], after `penalize`. keys: [B], one PRNG key for every row. The repetition
    penalty of `settings` is not applied here. bits: see `smallest_key`.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw(logits: Array) -> Array:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        truncated = truncate(scaled, settings.top_k, settings.top_p, bits)
        drawn = jax.vmap(jax.random.categorical)(keys, truncated)
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda _: greedy, logits)

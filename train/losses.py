"""Cross-entropy over large vocabularies, in blocks of positions. B batch, T time, D width, V
vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

IGNORE = -100  # a target without a loss


def token_loss(
    hidden: jax.Array,
    targets: jax.Array,
    logits: Callable[[jax.Array], jax.Array],
    block: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of the targets [B, T] that are not IGNORE, and their number.

    hidden [B, T, D]: the hidden state at the position of each target. logits: [..., D] -> [..., V].
    Only the logits of `block` positions of every row exist at the same time, in the forward and in
    the backward pass.
    """

    @jax.checkpoint
    def add(total, xs):
        hidden, targets = xs
        counted = targets != IGNORE
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(hidden).astype(jnp.float32), jnp.where(counted, targets, 0)
        )
        return total + jnp.sum(losses * counted), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), blocks(hidden, targets, block))
    return total, jnp.sum(targets != IGNORE)


def token_hits(
    hidden: jax.Array,
    targets: jax.Array,
    logits: Callable[[jax.Array], jax.Array],
    block: int = 256,
) -> jax.Array:
    """Whether each target is the most likely token, bool [B, T]; True where it is IGNORE.

    The parameters are those of `token_loss`. Greedy decoding gives a text exactly if all of its
    tokens are hits: up to each of them it has read the same.
    """

    def hits(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = xs
        return (jnp.argmax(logits(hidden), -1) == targets) | (targets == IGNORE)

    found = jnp.moveaxis(jax.lax.map(hits, blocks(hidden, targets, block)), 0, 1)
    return found.reshape(len(found), -1)[:, : targets.shape[1]]


def blocks(hidden: jax.Array, targets: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, T, D] and targets [B, T], in blocks of `size` positions on a first axis."""
    size = min(size, targets.shape[1])
    missing = -targets.shape[1] % size
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=IGNORE)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return cut(hidden), cut(targets)

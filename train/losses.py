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
    block = min(block, targets.shape[1])
    missing = -targets.shape[1] % block
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=IGNORE)

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total, xs):
        hidden, targets = xs
        counted = targets != IGNORE
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(hidden).astype(jnp.float32), jnp.where(counted, targets, 0)
        )
        return total + jnp.sum(losses * counted), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (blocks(hidden), blocks(targets)))
    return total, jnp.sum(targets != IGNORE)

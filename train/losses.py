"""Cross-entropy over large vocabularies, a few positions at a time. B batch, T time, D width, V vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

IGNORE = -100  # a target that carries no loss


def token_loss(
    hidden: jax.Array,
    targets: jax.Array,
    logits: Callable[[jax.Array], jax.Array],
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target [B, T] that is not IGNORE, given the hidden state [B, T, D] of its row: (sum, how many).

    logits: [..., D] -> [..., V]. They exist for `chunk` positions of every row at a time, forwards and backwards.
    """
    chunk = min(chunk, targets.shape[1])
    short = -targets.shape[1] % chunk
    hidden, targets = (
        jnp.pad(hidden, ((0, 0), (0, short), (0, 0))),
        jnp.pad(targets, ((0, 0), (0, short)), constant_values=IGNORE),
    )
    pieces = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)  # noqa: E731

    @jax.checkpoint
    def add(total, piece):
        hidden, targets = piece
        counted = targets != IGNORE
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(hidden).astype(jnp.float32), jnp.where(counted, targets, 0)
        )
        return total + jnp.sum(losses * counted), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (pieces(hidden), pieces(targets)))
    return total, jnp.sum(targets != IGNORE)

"""Training losses. B batch, T time, V vocabulary."""

import jax
import jax.numpy as jnp
import optax

IGNORE = -100  # a label that carries no loss


def next_token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [B, T, V] against the next position's labels [B, T]; IGNORE counts nowhere.

    The released Omni2SpeechQwen2ForCausalLM.forward (Hugging Face's shifted loss).
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), jnp.where(counted, targets, 0))
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)

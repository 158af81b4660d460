"""Gate fusion: an LLM hidden state and the token it produced, mixed elementwise (paper eq. 1-4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import Linear


class GateFusion(nnx.Module):
    """c = g * projected + (1 - g) * embedding, with g from both; LLM width -> speech-LM width D.

    mix: "gate" as above, or an ablation of the paper (table 2): "sum" of both without a gate, or
    the "hidden" state alone.
    """

    def __init__(self, llm_width: int, width: int, mix: str, rngs: nnx.Rngs):
        self.mix = mix
        self.up = Linear(rngs, (llm_width, 2 * llm_width), ("embed", "hidden"))
        self.down = Linear(rngs, (2 * llm_width, width), ("hidden", "embed"))
        self.gate = Linear(rngs, (2 * width, width), ("hidden", "embed")) if mix == "gate" else None

    def project(self, hidden: jax.Array) -> jax.Array:
        """LLM hidden states [..., D_llm] -> [..., D]."""
        return self.down(jax.nn.relu(self.up(hidden)))

    def gate_values(self, projected: jax.Array, embedding: jax.Array) -> jax.Array:
        """The gate g [..., D] of `projected` hidden states and token embeddings [..., D].

        1 = the hidden state alone, 0 = the embedding alone.
        """
        assert self.gate is not None, "the ablations have no gate"
        return jax.nn.sigmoid(self.gate(jnp.concatenate([projected, embedding], -1)))

    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """LLM hidden states [..., D_llm] -> inputs of the speech LM [..., D].

        embedding: the speech-LM embeddings [..., D] of the tokens that the states produced.
        """
        projected = self.project(hidden)
        if self.mix != "gate":
            return projected + embedding if self.mix == "sum" else projected
        g = self.gate_values(projected, embedding)
        return g * projected + (1 - g) * embedding

"""Gate fusion: what the LLM meant (hidden state) and what it said (token), mixed elementwise (paper equations 1-4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import Linear


class GateFusion(nnx.Module):
    """mix: "gate", or one of the paper's ablations (table 2): "sum" of both without a gate, "hidden" state alone."""

    def __init__(self, llm_width: int, width: int, mix: str, rngs: nnx.Rngs):
        self.mix = mix
        self.up = Linear(rngs, (llm_width, 2 * llm_width), ("embed", "hidden"))
        self.down = Linear(rngs, (2 * llm_width, width), ("hidden", "embed"))
        self.gate = Linear(rngs, (2 * width, width), ("hidden", "embed")) if mix == "gate" else None

    def project(self, hidden: jax.Array) -> jax.Array:
        """LLM hidden states [..., D_llm] -> [..., D]."""
        return self.down(jax.nn.relu(self.up(hidden)))

    def openness(self, meaning: jax.Array, embedding: jax.Array) -> jax.Array:
        """The gate g of projected hidden states and token embeddings [..., D]: 1 = the hidden state alone is heard."""
        return jax.nn.sigmoid(self.gate(jnp.concatenate([meaning, embedding], -1)))

    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """Hidden state that produced a token [..., D_llm] and the token's speech-LM embedding [..., D] -> [..., D]."""
        meaning = self.project(hidden)
        if self.mix != "gate":
            return meaning + embedding if self.mix == "sum" else meaning
        g = self.openness(meaning, embedding)
        return g * meaning + (1 - g) * embedding

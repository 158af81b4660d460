"""Qwen2.5: the LLM and, with a larger vocabulary, the speech LM. RMSNorm, RoPE, grouped queries, QKV bias, SwiGLU.

B batch, T query time, S key time, D width, N heads, K kv heads, H head size, F hidden, V vocabulary, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import DecoderConfig
from omni2_jax.models.kv_cache import KVCache
from omni2_jax.models.layers import Embedding, Linear, RMSNorm, attend, scan, stack
from omni2_jax.sharding import constrain

Array = jax.Array


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate the halves of x [B, T, N, H] by its positions [B, T] (RoFormer, in the half-split layout of Hugging Face)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, n, k, h = config.width, config.heads, config.kv_heads, config.head_size
        self.theta = config.rope_theta
        self.query = Linear(rngs, (d, n, h), ("embed", "heads", "head"), rank=config.rank)
        self.key = Linear(rngs, (d, k, h), ("embed", "kv_heads", "head"), rank=config.rank)
        self.value = Linear(rngs, (d, k, h), ("embed", "kv_heads", "head"), rank=config.rank)
        self.out = Linear(
            rngs, (n, h, d), ("heads", "head", "embed"), in_dims=2, bias=False, rank=config.rank
        )

    def __call__(
        self, x: Array, positions: Array, layer: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        q = rope(self.query(x), positions, self.theta)
        k = rope(self.key(x), positions, self.theta)
        v = self.value(x)
        if (
            cache is None
        ):  # rows begin at position 0, and what is behind their end is nobody's concern: the order alone tells who sees whom
            return self.out(attend(q, k, v, causal=True)), None
        cache = cache.write(layer, positions, k, v)
        k, v = cache.read(layer)
        seen = jnp.arange(cache.capacity)[None]
        mask = (seen[:, None, :] <= positions[:, :, None]) & (seen[:, None, :] >= 0)  # [B, T, S]
        return self.out(attend(q, k.astype(q.dtype), v.astype(q.dtype), mask[:, None])), cache


class SwiGLU(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, f = config.width, config.hidden
        self.gate = Linear(rngs, (d, f), ("embed", "hidden"), bias=False, rank=config.rank)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"), bias=False, rank=config.rank)
        self.down = Linear(rngs, (f, d), ("hidden", "embed"), bias=False, rank=config.rank)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self, x: Array, positions: Array, layer: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        y, cache = self.attention(self.attention_norm(x), positions, layer, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """The decoder: `embed`, call, `logits`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(rngs, config.vocabulary, config.width)
        self.layers = stack(config.layers, lambda r: Block(config, r), rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = (
            None
            if config.tied
            else Linear(
                rngs, (config.width, config.vocabulary), ("embed", "vocabulary"), bias=False
            )
        )

    def embed(self, ids: Array) -> Array:
        """Token ids [...] -> [..., D]; a negative id gives row 0 and must be masked by its position."""
        return self.embedding(jnp.maximum(ids, 0))

    def __call__(
        self, x: Array, positions: Array, cache: KVCache | None = None, remat: str = "none"
    ) -> tuple[Array, KVCache | None]:
        """Embeddings [B, T, D] at positions [B, T] (-1 = padding) -> hidden states after the final norm [B, T, D].

        Without a cache the positions of a row are 0, 1, 2 ..., with any padding behind them. With one, x continues it: keys and values
        are written at `positions` and everything up to them is seen.
        remat: what training keeps of a layer, see `layers.scan`.
        """

        def block(layer, carry, index):
            x, cache = layer(carry[0], positions, index, carry[1])
            return (constrain(x, "batch", None, None), cache), None

        (x, cache), _ = scan(self.layers, block, (x, cache), jnp.arange(self.config.layers), remat)
        return self.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = jnp.einsum(
                "...D,VD->...V", hidden, self.embedding.table[...].astype(hidden.dtype)
            )
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocabulary").astype(
            jnp.float32
        )

    def head_rows(self, first: int, count: int, last: int) -> Array:
        """The head's rows for tokens first..first + count - 1 and then `last`, [count + 1, D]: a head that can say nothing else."""
        table = self.embedding.table[...] if self.head is None else self.head.kernel[...].T
        return jnp.concatenate([table[first : first + count], table[last : last + 1]])

"""The decoder of Qwen2.5 and Qwen3: the LLM and, with a larger vocabulary, the speech LM.

RMSNorm before each sublayer, rotary positions, grouped queries, SwiGLU. The differences between the
families are stated in the configuration: `qkv_bias` (Qwen2), `qk_norm` (Qwen3), `head_size` and
`tied`.

B batch, T query time, S key time, D width, N heads, K kv heads, H head size, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import DecoderConfig
from omni2_jax.models.fusing import Fusing
from omni2_jax.models.kv_cache import Cache
from omni2_jax.models.layers import Embedding, Linear, RMSNorm, attention
from omni2_jax.models.stacks import scan, stack
from omni2_jax.sharding import constrain

Array = jax.Array


def residual_scale(config: DecoderConfig) -> float:
    """Of the initial values of matrices whose outputs are added up over all layers (GPT-2)."""
    return (2 * config.layers) ** -0.5


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate x [B, T, N, H] by its positions [B, T] (RoFormer, arXiv 2104.09864).

    The two numbers of a rotated pair are H / 2 apart, as in Hugging Face's `rotate_half`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(Fusing):
    """Causal self-attention with grouped queries and rotary positions, [B, T, D] -> [B, T, D]."""

    same_input, fused_axis = ("query", "key", "value"), -2

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, n, k, h = config.width, config.heads, config.kv_heads, config.head_size
        form: Any = {"rank": config.rank, "weights": config.weights}
        axes, kv_axes = ("embed", "heads", "head"), ("embed", "kv_heads", "head")
        self.theta = config.rope_theta
        self.query = Linear(rngs, (d, n, h), axes, bias=config.qkv_bias, **form)
        self.key = Linear(rngs, (d, k, h), kv_axes, bias=config.qkv_bias, **form)
        self.value = Linear(rngs, (d, k, h), kv_axes, bias=config.qkv_bias, **form)
        self.query_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.out = Linear(
            rngs,
            (n, h, d),
            ("heads", "head", "embed"),
            in_dims=2,
            bias=False,
            scale=residual_scale(config),
            **form,
        )

    def __call__(
        self,
        x: Array,
        positions: Array,
        layer: Any,
        cache: Cache | None,
        segments: Array | None = None,
        live: int | None = None,
    ) -> tuple[Array, Cache | None]:
        """x [B, T, D] at positions [B, T] -> [B, T, D] and the cache.

        layer: the layer's index in the cache, which gets its new keys and values; an int where
        layers are listed. segments [B, T]: without a cache, positions of other segments are not
        seen. live: see `Decoder`.
        """
        q, k, v = self.same_inputs(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rope(q, positions, self.theta), rope(k, positions, self.theta)
        if cache is None:  # rows start at 0 and are right-padded, so a causal mask is enough
            mask = None
            if segments is not None:
                mask = (segments[:, :, None] == segments[:, None, :])[:, None]
            return self.out(attention(q, k, v, mask, causal=True)), None
        cache = cache.write(layer, positions, k, v)
        size = cache.capacity if live is None else live
        return self.out(cache.attend(layer, q, positions, size)), cache


class SwiGLU(Fusing):
    """Feed-forward network down(silu(gate(x)) * up(x)), [..., D] -> [..., D] (arXiv 2002.05202)."""

    same_input = ("gate", "up")

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        d, f = config.width, config.hidden
        form: Any = {"bias": False, "rank": config.rank, "weights": config.weights}
        self.gate = Linear(rngs, (d, f), ("embed", "hidden"), **form)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"), **form)
        self.down = Linear(rngs, (f, d), ("hidden", "embed"), scale=residual_scale(config), **form)

    def __call__(self, x: Array) -> Array:
        gate, up = self.same_inputs(x)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then a feed-forward network, each with a norm and a residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self,
        x: Array,
        positions: Array,
        layer: Any,
        cache: Cache | None,
        segments: Array | None = None,
        live: int | None = None,
    ) -> tuple[Array, Cache | None]:
        y, cache = self.attention(self.attention_norm(x), positions, layer, cache, segments, live)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A language model: `embed` ids, call it on embeddings, take `logits` of hidden states."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        weights = config.weights
        self.embedding = Embedding(rngs, config.vocabulary, config.width, weights=weights)
        self.layers = stack(config.layers, lambda r: Block(config, r), rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        shape, axes = (config.width, config.vocabulary), ("embed", "vocabulary")
        self.head = None if config.tied else Linear(rngs, shape, axes, bias=False, weights=weights)

    def embed(self, ids: Array) -> Array:
        """Token ids [...] -> [..., D]. A negative id gets row 0; its position must be masked."""
        return self.embedding(jnp.maximum(ids, 0))

    def __call__(
        self,
        x: Array,
        positions: Array,
        cache: Cache | None = None,
        remat: str = "none",
        segments: Array | None = None,
        live: int | None = None,
    ) -> tuple[Array, Cache | None]:
        """Embeddings x [B, T, D] at positions [B, T] -> hidden states [B, T, D], and the cache.

        Without a cache each row has the positions 0, 1, 2 ... and padding (-1) only after them.
        With a cache x continues its rows: keys and values are written at `positions`, except at
        padding (-1), and a query attends to all positions up to its own. The hidden states are
        those after the last norm.
        remat: what training keeps of a layer, see `stacks.scan`. segments [B, T]: for rows without
        a cache that hold several texts one after the other, the number of the text of each
        position; a text sees itself alone. live: how many positions of the cache are read, all by
        default; those of every query must be among them.
        """

        def block(layer: Block, carry: tuple, index: Array) -> tuple[tuple, None]:
            x, cache = layer(carry[0], positions, index, carry[1], segments, live)
            return (constrain(x, "batch", None, None), cache), None

        (x, cache), _ = scan(self.layers, block, (x, cache), np.arange(self.config.layers), remat)
        return self.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = products(
                hidden, self.embedding.table[...], value_of(self.embedding.table_scale)
            )
        axes: Any = ("batch", *(None,) * (logits.ndim - 2), "vocabulary")
        return constrain(logits, *axes).astype(jnp.float32)

    def head_rows(self, first: int, count: int, last: int) -> tuple[Array, Array | None]:
        """Rows [count + 1, D] of the output matrix: `count` tokens from `first` on, then `last`.

        With int8 weights also the scales of the rows [count + 1]. Logits over these rows alone
        (`products`) can give no other token.
        """

        def chosen(table: Array) -> Array:
            return jnp.concatenate([table[first : first + count], table[last : last + 1]])

        if self.head is None:
            table, scale = self.embedding.table[...], value_of(self.embedding.table_scale)
        else:
            table, scale = self.head.kernel[...].T, value_of(self.head.kernel_scale)
        return chosen(table), None if scale is None else chosen(scale)


def products(hidden: Array, table: Array, scale: Array | None) -> Array:
    """Hidden states [..., D] times rows of a table [V, D] (int8: with a scale [V]) -> [..., V]."""
    logits = jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype))
    return logits if scale is None else logits * scale.astype(hidden.dtype)


def value_of(param: nnx.Param | None) -> Array | None:
    """The value of a parameter that may not be there."""
    return None if param is None else param[...]

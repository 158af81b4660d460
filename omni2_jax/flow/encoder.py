"""The flow's encoder: unit embeddings to mel-rate features. Look-ahead, conformer blocks, upsampling by 2, more blocks.

B rows, T frames of the window, S frames that can be seen, D width, N heads, H head size. Conformer blocks here have neither a
convolution nor a macaron half (CosyVoice2's settings), so a block is relative attention and a feed-forward layer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.flow.context import CausalConv, Window, attend
from omni2_jax.layers import Conv1d, LayerNorm, Linear, param, scan, stack

Array = jax.Array


def waves(index: Array, width: int) -> tuple[Array, Array]:
    """Sine and cosine [B, T, width / 2] of the sinusoidal position code of frames `index` [B, T]."""
    frequency = jnp.exp(jnp.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = index[..., None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


class RelativeAttention(nnx.Module):
    """Attention with Transformer-XL's relative positions (reference: RelPositionMultiHeadedAttention).

    The position score is (q + v) . W r(i - j), r being sinusoidal. By the angle sum formulas this is a rotation of
    W'(q + v) by i against the plain code of j, so no [T, 2T - 1] table is built and keys may lie anywhere.
    """

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, n = config.width, config.heads
        h = d // n
        self.query = Linear(rngs, (d, n, h), ("embed", "heads", "head"))
        self.key = Linear(rngs, (d, n, h), ("embed", "heads", "head"))
        self.value = Linear(rngs, (d, n, h), ("embed", "heads", "head"))
        self.out = Linear(rngs, (n, h, d), ("heads", "head", "embed"), in_dims=2)
        self.position = param(rngs, (d // 2, 2, n, h), ("embed", None, "heads", "head"), fan_in=d)  # sine and cosine of each frequency
        self.content_bias = param(rngs, (n, h), ("heads", "head"))
        self.position_bias = param(rngs, (n, h), ("heads", "head"))

    def position_scores(self, q: Array, window: Window) -> Array:
        """Scaled queries [B, T, N, H] -> [B, N, T, S]."""
        sine, cosine = jnp.einsum("BTNH,DCNH->CBTND", q, self.position[...].astype(q.dtype))
        width = 2 * self.position.shape[0]
        sin_i, cos_i = (wave[:, :, None, :].astype(q.dtype) for wave in waves(window.query, width))
        turned = jnp.concatenate([cosine * sin_i - sine * cos_i, sine * sin_i + cosine * cos_i], -1)
        return jnp.einsum("BTND,BSD->BNTS", turned, jnp.concatenate(waves(window.key, width), -1).astype(q.dtype))

    def __call__(self, x: Array, window: Window) -> Array:
        q, scale = self.query(x), self.query.kernel.shape[-1] ** -0.5
        near = (q + self.content_bias[...].astype(x.dtype)) * scale
        far = self.position_scores((q + self.position_bias[...].astype(x.dtype)) * scale, window)
        return self.out(attend(near, self.key(x), self.value(x), far + window.bias))


class Block(nnx.Module):
    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, f = config.width, config.hidden
        self.attention_norm = LayerNorm(d, eps=1e-12)
        self.attention = RelativeAttention(config, rngs)
        self.mlp_norm = LayerNorm(d, eps=1e-12)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"))
        self.down = Linear(rngs, (f, d), ("hidden", "embed"))

    def __call__(self, x: Array, window: Window) -> Array:
        x = x + self.attention(self.attention_norm(x), window)
        return x + self.down(jax.nn.silu(self.up(self.mlp_norm(x))))


class Embed(nnx.Module):
    """Linear, layer norm and the Transformer's sqrt(D), before each of the two stacks of blocks."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.scale = math.sqrt(config.width)
        self.linear = Linear(rngs, (config.width, config.width), ("embed", None))
        self.norm = LayerNorm(config.width)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.linear(x)) * self.scale


class LookAhead(nnx.Module):
    """Each unit is mixed with the `lookahead` units behind it (zeros after the last) and two before it."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, ahead = config.width, config.lookahead
        self.ahead = Conv1d(rngs, (ahead + 1, d, d), padding=(0, ahead), axes=(None, None, "embed"))
        self.behind = CausalConv(rngs, 3, d, d)

    def __call__(self, x: Array) -> Array:
        return x + self.behind(jax.nn.leaky_relu(self.ahead(x)))


class Encoder(nnx.Module):
    """Reference: UpsampleConformerEncoder."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.rate = config.upsample
        self.embed = Embed(config, rngs)
        self.look_ahead = LookAhead(config, rngs)
        self.blocks = stack(config.layers, lambda r: Block(config, r), rngs)
        self.upsample = CausalConv(rngs, 2 * config.upsample + 1, config.width, config.width)
        self.up_embed = Embed(config, rngs)
        self.up_blocks = stack(config.up_layers, lambda r: Block(config, r), rngs)
        self.norm = LayerNorm(config.width)

    def __call__(self, x: Array, units: Window, frames: Window) -> Array:
        """Unit embeddings [B, T, D] -> features [B, 2T, D]; `units` and `frames` say what is seen before and after upsampling."""
        x = self.look_ahead(self.embed(x) * units.valid[..., None])  # units past the end must look like no units at all
        x, _ = scan(self.blocks, lambda block, x, _: (block(x, units), None), x)
        x = self.up_embed(self.upsample(jnp.repeat(x, self.rate, axis=1)))
        x, _ = scan(self.up_blocks, lambda block, x, _: (block(x, frames), None), x)
        return self.norm(x)

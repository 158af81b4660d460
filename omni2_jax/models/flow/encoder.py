"""The flow's encoder: unit embeddings to mel-rate features. Look-ahead, conformer blocks, upsampling by 2, more blocks.

B rows, T frames of the window, S frames that can be seen, D width, N heads, H head size. Conformer blocks here have neither a
convolution nor a macaron half (CosyVoice2's settings), so a block is relative attention and a feed-forward layer.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.context import CausalConv, Memory, Window, attend, run_blocks
from omni2_jax.models.layers import Conv1d, LayerNorm, Linear, param, stack

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
        self.position = param(
            rngs, (d // 2, 2, n, h), ("embed", None, "heads", "head"), fan_in=d
        )  # sine and cosine of each frequency
        self.content_bias = param(rngs, (n, h), ("heads", "head"))
        self.position_bias = param(rngs, (n, h), ("heads", "head"))

    def position_scores(self, q: Array, window: Window) -> Array:
        """Scaled queries [B, T, N, H] -> [B, N, T, S]."""
        sine, cosine = jnp.einsum("BTNH,DCNH->CBTND", q, self.position[...].astype(q.dtype))
        width, origin = (
            2 * self.position.shape[0],
            window.query[:, :1],
        )  # small angles are exact ones
        sin_i, cos_i = (
            wave[:, :, None, :].astype(q.dtype) for wave in waves(window.query - origin, width)
        )
        turned = jnp.concatenate([cosine * sin_i - sine * cos_i, sine * sin_i + cosine * cos_i], -1)
        return jnp.einsum(
            "BTND,BSD->BNTS",
            turned,
            jnp.concatenate(waves(window.key - origin, width), -1).astype(q.dtype),
        )

    def __call__(
        self, x: Array, window: Window, memory: Memory | None, layer: Array
    ) -> tuple[Array, Memory | None]:
        q, scale = self.query(x), self.query.kernel.shape[-1] ** -0.5
        near = (q + self.content_bias[...].astype(x.dtype)) * scale
        far = self.position_scores((q + self.position_bias[...].astype(x.dtype)) * scale, window)
        y, memory = attend(
            near, self.key(x), self.value(x), far + window.bias, window, memory, layer
        )
        return self.out(y), memory


class Block(nnx.Module):
    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, f = config.width, config.hidden
        self.attention_norm = LayerNorm(d, eps=1e-12)
        self.attention = RelativeAttention(config, rngs)
        self.mlp_norm = LayerNorm(d, eps=1e-12)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"))
        self.down = Linear(rngs, (f, d), ("hidden", "embed"))

    def __call__(
        self, x: Array, window: Window, memory: Memory | None, layer: Array
    ) -> tuple[Array, Memory | None]:
        y, memory = self.attention(self.attention_norm(x), window, memory, layer)
        x = x + y
        return x + self.down(jax.nn.silu(self.up(self.mlp_norm(x)))), memory


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

    def __call__(
        self, x: Array, window: Window, tail: Array | None = None
    ) -> tuple[Array, Array | None]:
        y, tail = self.behind(jax.nn.leaky_relu(self.ahead(x)), window, tail)
        return x + y, tail


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderPast:
    """What is kept of finished chunks."""

    look_ahead: Array  # [B, 2, D] tail
    upsample: Array  # [B, 4, D] tail
    units: Memory  # of the blocks before upsampling
    frames: Memory  # and after


class Encoder(nnx.Module):
    """Reference: UpsampleConformerEncoder."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.look_ahead = LookAhead(config, rngs)
        self.blocks = stack(config.layers, lambda r: Block(config, r), rngs)
        self.upsample = CausalConv(rngs, 2 * config.upsample + 1, config.width, config.width)
        self.up_embed = Embed(config, rngs)
        self.up_blocks = stack(config.up_layers, lambda r: Block(config, r), rngs)
        self.norm = LayerNorm(config.width)

    def past(self, batch: int, capacity: int, dtype) -> EncoderPast:
        """Room for `capacity` units."""
        c = self.config
        heads = c.heads, c.width // c.heads
        return EncoderPast(
            self.look_ahead.behind.tail(batch, dtype),
            self.upsample.tail(batch, dtype),
            Memory.empty(c.layers, batch, capacity, *heads, dtype),
            Memory.empty(c.up_layers, batch, c.upsample * capacity, *heads, dtype),
        )

    def __call__(
        self, x: Array, units: Window, frames: Window, past: EncoderPast | None = None
    ) -> tuple[Array, EncoderPast | None]:
        """Unit embeddings [B, T, D] -> features [B, 2T, D]; `units` and `frames` are the window before and after upsampling.

        x and `units` may reach further, to what the last of the T units look ahead to.
        """
        c, p = self.config, past or EncoderPast(None, None, None, None)
        x = (
            self.embed(x) * units.valid[..., None]
        )  # units past the end must look like no units at all
        x, look_ahead = self.look_ahead(x, units, p.look_ahead)
        inside = frames.valid.shape[1] // c.upsample
        x, units = x[:, :inside], units.first(inside)
        x, unit_memory = run_blocks(self.blocks, x, units, p.units, jnp.arange(c.layers))
        x, upsample = self.upsample(jnp.repeat(x, c.upsample, axis=1), frames, p.upsample)
        x, frame_memory = run_blocks(
            self.up_blocks, self.up_embed(x), frames, p.frames, jnp.arange(c.up_layers)
        )
        return self.norm(x), past and EncoderPast(look_ahead, upsample, unit_memory, frame_memory)

"""The flow's encoder: unit embeddings to features at the mel's frame rate.

Look-ahead, conformer blocks, upsampling by 2, more conformer blocks. With CosyVoice2's settings a
conformer block has neither a convolution nor a macaron half: it is relative attention and a
feed-forward layer.
B rows, T frames of the window, S keys, D width, N heads, H head size.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.attention import cached_attention, run_blocks
from omni2_jax.models.flow.cache import ConvCache, Maybe, RingKVCache
from omni2_jax.models.flow.conv import CausalConv, by_row
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.fusing import Fusing
from omni2_jax.models.layers import Conv1d, LayerNorm, Linear, param
from omni2_jax.models.stacks import is_unrolled, stack

Array = jax.Array


def sinusoids(index: Array, width: int) -> tuple[Array, Array]:
    """The sinusoidal position code of frames `index` [B, T]: sine and cosine [B, T, width / 2]."""
    frequency = jnp.exp(jnp.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = index[..., None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


class RelativeAttention(Fusing):
    """Attention with Transformer-XL's relative positions.

    The score of a key at distance i - j is (q + v) . W r(i - j), where r is sinusoidal. By the
    angle sum formulas this equals W'(q + v), rotated by i, times the plain position code of j. So
    no table of [T, 2T - 1] distances is built, and the keys may be in any order.
    Reference: RelPositionMultiHeadedAttention.
    """

    same_input, fused_axis = ("query", "key", "value"), -2

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, n = config.width, config.heads
        h = d // n
        self.scale = h**-0.5
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
        """Scaled queries [B, T, N, H] -> the position term of their scores, [B, N, T, S]."""
        sine, cosine = jnp.einsum("BTNH,DCNH->CBTND", q, self.position[...].astype(q.dtype))
        width = 2 * self.position.shape[0]
        origin = window.query[:, :1]  # float32 is more exact for small angles than for large ones
        sin_i, cos_i = (
            wave[:, :, None, :].astype(q.dtype) for wave in sinusoids(window.query - origin, width)
        )
        rotated = jnp.concatenate(
            [cosine * sin_i - sine * cos_i, sine * sin_i + cosine * cos_i], -1
        )
        code_j = jnp.concatenate(sinusoids(window.key - origin, width), -1).astype(q.dtype)
        return jnp.einsum("BTND,BSD->BNTS", rotated, code_j)

    def __call__(
        self, x: Array, window: Window, cache: Maybe[RingKVCache]
    ) -> tuple[Array, Maybe[RingKVCache]]:
        """x [B, T, D] -> ([B, T, D], cache)."""
        q, k, v = self.same_inputs(x)
        content_q = (q + self.content_bias[...].astype(x.dtype)) * self.scale
        position_q = (q + self.position_bias[...].astype(x.dtype)) * self.scale
        bias = self.position_scores(position_q, window) + window.bias
        y, cache = cached_attention(content_q, k, v, bias, window, cache)
        return self.out(y), cache


class Block(nnx.Module):
    """Pre-norm relative attention and a feed-forward layer (reference: ConformerEncoderLayer)."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, f = config.width, config.hidden
        self.attention_norm = LayerNorm(d, eps=1e-12)
        self.attention = RelativeAttention(config, rngs)
        self.mlp_norm = LayerNorm(d, eps=1e-12)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"))
        self.down = Linear(rngs, (f, d), ("hidden", "embed"))

    def __call__(
        self, x: Array, window: Window, cache: Maybe[RingKVCache]
    ) -> tuple[Array, Maybe[RingKVCache]]:
        """x [B, T, D] -> ([B, T, D], cache)."""
        y, cache = self.attention(self.attention_norm(x), window, cache)
        x = x + y
        return x + self.down(jax.nn.silu(self.up(self.mlp_norm(x)))), cache


class Embed(nnx.Module):
    """Linear layer, layer norm and a factor of sqrt(D), before each stack of blocks."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.scale = math.sqrt(config.width)
        self.linear = Linear(rngs, (config.width, config.width), ("embed", None))
        self.norm = LayerNorm(config.width)

    def __call__(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        return self.norm(self.linear(x)) * self.scale


class LookAhead(nnx.Module):
    """Mixes each unit with the `lookahead` units after it and the two before it.

    There are zeros after the last unit (reference: PreLookaheadLayer).
    """

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        d, ahead = config.width, config.lookahead
        self.ahead = Conv1d(rngs, (ahead + 1, d, d), padding=(0, ahead), axes=(None, None, "embed"))
        self.behind = CausalConv(rngs, 3, d, d)

    def __call__(
        self, x: Array, window: Window, cache: Maybe[ConvCache]
    ) -> tuple[Array, Maybe[ConvCache]]:
        """x [B, T, D] -> ([B, T, D], cache)."""
        y = self.ahead(x) if cache is None else by_row(self.ahead, x)
        y, cache = self.behind(jax.nn.leaky_relu(y), window, cache)
        return x + y, cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderCache:
    """What the encoder keeps of finished units."""

    look_ahead: ConvCache  # inputs [B, 2, D]
    upsample: ConvCache  # inputs [B, 4, D]
    units: RingKVCache  # of the blocks before upsampling: one place a unit
    frames: RingKVCache  # of the blocks after it: one place a mel frame


class Encoder(nnx.Module):
    """Unit embeddings to features at the mel's frame rate (reference: UpsampleConformerEncoder)."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.look_ahead = LookAhead(config, rngs)
        self.blocks = stack(config.layers, lambda r: Block(config, r), rngs)
        self.upsample = CausalConv(rngs, 2 * config.upsample + 1, config.width, config.width)
        self.up_embed = Embed(config, rngs)
        self.up_blocks = stack(config.up_layers, lambda r: Block(config, r), rngs)
        self.norm = LayerNorm(config.width)

    def empty_cache(self, batch: int, capacity: int, dtype) -> EncoderCache:
        """A cache of `capacity` units for each of `batch` rows."""
        c = self.config

        def kv(blocks: nnx.Module, layers: int, places: int) -> RingKVCache:
            shape = (batch, c.heads, places, c.width // c.heads)
            return RingKVCache.empty(layers, 1, shape, dtype, is_unrolled(blocks))

        return EncoderCache(
            look_ahead=self.look_ahead.behind.empty_cache(batch, dtype),
            upsample=self.upsample.empty_cache(batch, dtype),
            units=kv(self.blocks, c.layers, capacity),
            frames=kv(self.up_blocks, c.up_layers, c.upsample * capacity),
        )

    def __call__(
        self,
        x: Array,
        units: Window,
        frames: Window,
        cache: Maybe[EncoderCache],
        remat: str = "full",
    ) -> tuple[Array, Maybe[EncoderCache]]:
        """Unit embeddings x [B, T', D] -> (features [B, 2T, D], cache).

        `units` [B, T'] and `frames` [B, 2T] are the windows before and after upsampling. T' may be
        larger than T: the last of the T units are mixed with the units after them (LookAhead).
        remat: see `run_blocks`.
        """
        num_units = frames.valid.shape[1] // self.config.upsample
        x = self.embed(x) * units.valid[..., None]  # like the zeros that follow the last unit
        x, look_ahead = self.look_ahead(x, units, cache and cache.look_ahead)
        x, units = x[:, :num_units], units.first(num_units)
        unit_kv = cache and cache.units.of_pass(jnp.int32(0), self.config.layers)
        x, unit_kv = run_blocks(self.blocks, x, units, unit_kv, remat)
        x = jnp.repeat(x, self.config.upsample, axis=1)
        x, upsample = self.upsample(x, frames, cache and cache.upsample)
        x = self.up_embed(x)
        frame_kv = cache and cache.frames.of_pass(jnp.int32(0), self.config.up_layers)
        x, frame_kv = run_blocks(self.up_blocks, x, frames, frame_kv, remat)
        x = self.norm(x)
        if cache is None:
            return x, cache
        unit_kv, frame_kv = unit_kv.between_steps(), frame_kv.between_steps()
        return x, EncoderCache(look_ahead, upsample, unit_kv, frame_kv)

"""The flow's estimator: the velocity of a noisy mel at time t.

The UNet of CosyVoice2 has one level and never changes the frame rate: down, middle and up are
stages in a row, with one skip connection. Each stage is two causal convolutions and transformers.

Training from nothing starts near a network that passes its first inputs, the noisy mel, on to its
last convolution. The velocity depends on all of it, and learning to pass it takes thousands of
steps from random values.
B rows, T frames of the window, S keys, M mel bins, C channels, N heads, H head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.attention import cached_attention, run_blocks
from omni2_jax.models.flow.cache import NO_CACHE, ConvCache, Maybe, RingKVCache
from omni2_jax.models.flow.conv import CausalConv
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.fusing import Fusing
from omni2_jax.models.layers import (
    Identity,
    LayerNorm,
    Linear,
    constant,
    freed,
    is_unrolled,
    scan,
    stack,
)

Array = jax.Array

BRANCH_SCALE = 0.2  # of what a residual branch adds at first


class TimeEmbedding(nnx.Module):
    """Time in [0, 1], [B] -> [B, 4C].

    References: Matcha-TTS's SinusoidalPosEmb (scale 1000) and TimestepEmbedding.
    """

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.width = 4 * config.mels  # that of the estimator's input
        self.linear1 = Linear(rngs, (self.width, 4 * config.channels), (None, "embed"))
        self.linear2 = Linear(rngs, (4 * config.channels, 4 * config.channels), ("embed", None))

    def __call__(self, t: Array) -> Array:
        half = self.width // 2
        angle = 1000 * t[:, None] * jnp.exp(jnp.arange(half) * (-math.log(10000.0) / (half - 1)))
        return self.linear2(
            jax.nn.silu(self.linear1(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
        )


class ConvBlock(nnx.Module):
    """Causal convolution, layer norm, Mish (reference: CausalBlock1D).

    Padded frames are set to zero before and after it.
    """

    def __init__(self, c_in: int, c_out: int, rngs: nnx.Rngs, scale: float = 1.0):
        self.conv = CausalConv(rngs, 3, c_in, c_out)
        self.norm = LayerNorm(c_out, scale=scale)

    def __call__(
        self, x: Array, window: Window, cache: Maybe[ConvCache]
    ) -> tuple[Array, Maybe[ConvCache]]:
        """x [B, T, C] -> ([B, T, C'], cache)."""
        valid = window.valid[..., None]
        y, cache = self.conv(x * valid, window, cache)
        return jax.nn.mish(self.norm(y)) * valid, cache


class Attention(Fusing):
    """Multi-head self-attention without positions."""

    same_input, fused_axis = ("query", "key", "value"), -2

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c, n, h = config.channels, config.estimator_heads, config.estimator_head_size
        self.scale = h**-0.5
        self.query = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.key = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.value = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.out = Linear(
            rngs, (n, h, c), ("heads", "head", "embed"), in_dims=2, scale=BRANCH_SCALE
        )

    def __call__(
        self, x: Array, window: Window, cache: Maybe[RingKVCache]
    ) -> tuple[Array, Maybe[RingKVCache]]:
        """x [B, T, C] -> ([B, T, C], cache)."""
        q, k, v = self.same_inputs(x)
        y, cache = cached_attention(q * self.scale, k, v, window.bias, window, cache)
        return self.out(y), cache


class Block(nnx.Module):
    """Pre-norm self-attention and a GELU feed-forward layer (reference: BasicTransformerBlock)."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.attention_norm = LayerNorm(c)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(c)
        self.up = Linear(rngs, (c, 4 * c), ("embed", "hidden"))
        self.down = Linear(rngs, (4 * c, c), ("hidden", "embed"), scale=BRANCH_SCALE)

    def multiply_in(self, dtype: str, donate: bool = False) -> None:
        """Keep the matrices in `dtype`, and multiply in it. Norms, softmax and sums stay float32.

        donate: see `layers.freed`.
        """
        self.attention_norm.output = self.mlp_norm.output = jnp.dtype(dtype)
        for layer in (self.attention.out, self.up, self.down):
            layer.output = jnp.dtype(jnp.float32)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                old = module.kernel[...]
                module.kernel = module.kernel.replace(freed([old], old.astype(dtype), donate))

    def __call__(
        self, x: Array, window: Window, cache: Maybe[RingKVCache]
    ) -> tuple[Array, Maybe[RingKVCache]]:
        """x [B, T, C] -> ([B, T, C], cache)."""
        y, cache = self.attention(self.attention_norm(x), window, cache)
        x = x + y
        normed = self.mlp_norm(x)
        hidden = jax.nn.gelu(self.up(normed), approximate=False).astype(normed.dtype)
        return x + self.down(hidden), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageConvs:
    """The caches of a stage's two convolutions."""

    conv1: ConvCache
    conv2: ConvCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageCache:
    """What a stage keeps of finished frames."""

    convs: StageConvs
    kv: RingKVCache  # the whole estimator's, at this stage's first layer


class Stage(nnx.Module):
    """A residual pair of convolutions with the time added, then transformer blocks.

    Reference: CausalResnetBlock1D and the BasicTransformerBlocks after it.
    """

    def __init__(self, config: FlowConfig, c_in: int, rngs: nnx.Rngs):
        c = config.channels
        self.conv1 = ConvBlock(c_in, c, rngs)
        self.time = Linear(rngs, (4 * c, c), (None, "embed"))
        self.conv2 = ConvBlock(c, c, rngs, scale=BRANCH_SCALE)
        self.skip = Linear(rngs, (c_in, c), (None, "embed"))
        self.skip.kernel = constant((c_in, c), (None, "embed"), Identity())
        self.blocks = stack(config.blocks, lambda r: Block(config, r), rngs)

    def empty_convs(self, batch: int, dtype) -> StageConvs:
        """The caches of the convolutions before an utterance's first window."""
        return StageConvs(
            self.conv1.conv.empty_cache(batch, dtype), self.conv2.conv.empty_cache(batch, dtype)
        )

    def __call__(
        self,
        x: Array,
        time: Array,
        window: Window,
        cache: Maybe[StageCache],
        remat: str = "full",
    ) -> tuple[Array, Maybe[StageCache]]:
        """x [B, T, C_in], time [B or 1, 4C] -> ([B, T, C], cache)."""
        y, conv1 = self.conv1(x, window, cache and cache.convs.conv1)
        y = y + self.time(jax.nn.mish(time))[:, None]
        y, conv2 = self.conv2(y, window, cache and cache.convs.conv2)
        y = y + self.skip(x * window.valid[..., None])
        y, kv = run_blocks(self.blocks, y, window, cache and cache.kv, remat)
        if cache is None:
            return y, cache
        return y, StageCache(StageConvs(conv1, conv2), kv)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EstimatorConvs:
    """The caches of all convolutions of the estimator, of one Euler step or (axis 0) of all."""

    down: StageConvs
    down_conv: ConvCache
    middle: StageConvs  # with an axis of stages
    up: StageConvs
    up_conv: ConvCache
    final: ConvCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EstimatorCache:
    """What the estimator keeps of finished frames.

    Each Euler step is a network pass of its own and has its own share of both caches. Rows 0 to
    B - 1 are the guided branch, rows B to 2B - 1 the free one.
    """

    convs: EstimatorConvs
    kv: RingKVCache  # a pass over all layers for each step


class Estimator(nnx.Module):
    """Reference: ConditionalDecoder with causal = True and one level of channels."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.config = config
        self.layers = (config.mid_blocks + 2) * config.blocks  # attention layers of all stages
        self.time = TimeEmbedding(config, rngs)
        self.down = Stage(config, 4 * config.mels, rngs)
        self.down_conv = CausalConv(rngs, 3, c, c)
        self.middle = stack(config.mid_blocks, lambda r: Stage(config, c, r), rngs)
        self.up = Stage(config, 2 * c, rngs)
        self.up_conv = CausalConv(rngs, 3, c, c)
        self.final = ConvBlock(c, c, rngs)
        for conv in (self.down_conv, self.up_conv, self.final.conv):
            conv.kernel = constant(conv.kernel.shape, (None, None, "embed"), Identity(causal=True))
        # The first steps of training then begin near a velocity of zero.
        self.out = Linear(rngs, (c, config.mels), ("embed", None), scale=0.1)

    def empty_cache(self, batch: int, capacity: int, dtype) -> EstimatorCache:
        """A cache of `capacity` mel frames for each of `batch` rows and each Euler step.

        dtype: of the cache. Keys and values that are computed in another dtype are kept in that.
        """
        c = self.config

        def middle(stage: Stage, carry, _):
            return carry, stage.empty_convs(batch, dtype)

        convs = EstimatorConvs(
            down=self.down.empty_convs(batch, dtype),
            down_conv=self.down_conv.empty_cache(batch, dtype),
            middle=scan(self.middle, middle, None)[1],
            up=self.up.empty_convs(batch, dtype),
            up_conv=self.up_conv.empty_cache(batch, dtype),
            final=self.final.conv.empty_cache(batch, dtype),
        )
        shape = (batch, c.estimator_heads, capacity, c.estimator_head_size)
        blocks: Any = self.down.blocks
        unrolled = is_unrolled(blocks)
        kv_dtype = (blocks[0] if unrolled else blocks).attention_norm.output or dtype
        return EstimatorCache(
            convs=jax.tree.map(lambda leaf: jnp.zeros((c.steps, *leaf.shape), dtype), convs),
            kv=RingKVCache.empty(self.layers, c.steps, shape, kv_dtype, unrolled),
        )

    def __call__(
        self,
        x: Array,
        cond: Array,
        t: Array,
        window: Window,
        cache: Maybe[EstimatorCache],
        remat: str = "full",
    ) -> tuple[Array, Maybe[EstimatorCache]]:
        """Mel x [B, T, M] at time t [B or 1] and its conditions -> (dx/dt [B, T, M], cache).

        cond [B, T, 3M]: the encoder's mel, the speaker, the prompt's mel. The cache is that of one
        Euler step: its convolutions, and the key/value cache at the step's first layer, from where
        it advances by one with every block. remat: see `run_blocks`.
        """
        valid, time = window.valid[..., None], self.time(t)
        convs, kv = (NO_CACHE, NO_CACHE) if cache is None else (cache.convs, cache.kv)

        def run(stage: Stage, carry, convs: Maybe[StageConvs]):
            """One stage: ((x, kv), its convolutions) -> the same after it."""
            x, kv = carry
            x, cache = stage(x, time, window, kv and StageCache(convs, kv), remat)
            return (x, cache and cache.kv), cache and cache.convs

        x = jnp.concatenate([x, cond], -1)
        (skip, kv), down = run(self.down, (x, kv), convs and convs.down)
        x, down_conv = self.down_conv(skip * valid, window, convs and convs.down_conv)
        (x, kv), middle = scan(self.middle, run, (x, kv), convs and convs.middle)
        x = jnp.concatenate([x, skip], -1)
        (x, kv), up = run(self.up, (x, kv), convs and convs.up)
        x, up_conv = self.up_conv(x * valid, window, convs and convs.up_conv)
        x, final = self.final(x, window, convs and convs.final)
        velocity = self.out(x) * valid
        if cache is None:
            return velocity, cache
        return velocity, EstimatorCache(
            EstimatorConvs(down, down_conv, middle, up, up_conv, final), kv
        )

"""The flow's estimator: the velocity of a noisy mel at time t.

The UNet of CosyVoice2 has one level and never changes the frame rate: down, middle and up are
stages in a row, with one skip connection. Each stage is two causal convolutions and transformers.

Training from nothing starts near a network that passes its first inputs, the noisy mel, on to its
last convolution. The velocity depends on all of it, and learning to pass it takes thousands of
steps from random values.
B rows, T frames of the window, S keys, M mel bins, C channels, N heads, H head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.attention import cached_attention, heads_first, run_blocks
from omni2_jax.models.flow.cache import NO_CACHE, ConvCache, Maybe, RingKVCache
from omni2_jax.models.flow.conv import CausalConv
from omni2_jax.models.flow.estimator_cache import (
    EstimatorCache,
    EstimatorConvs,
    StageCache,
    StageConvs,
    packed,
    unpacked,
)
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.fusing import Fusing
from omni2_jax.models.layers import Identity, LayerNorm, Linear, constant, freed
from omni2_jax.models.stacks import is_unrolled, scan, stack

Array = jax.Array

BRANCH_SCALE = 0.2  # of what a residual branch adds at first
# Frames of all rows together, from which on `Attention.by_head` costs more than the kernel that it
# saves: the heads' shares of so many outputs are 4 MB, and to write and read them takes as long, at
# 3.35 TB/s, as to launch a kernel.
MANY_FRAMES = 512


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
        y, cache = self.conv(x * window.valid[..., None], window, cache)
        return self.activate(y, window), cache

    def activate(self, y: Array, window: Window) -> Array:
        """What follows the convolution."""
        return jax.nn.mish(self.norm(y)) * window.valid[..., None]


class Attention(Fusing):
    """Multi-head self-attention without positions.

    by_head: the outputs of the heads are added up after the last matrix, not by it. A GPU then need
    not bring the heads of a frame together, which takes a kernel of its own.
    """

    same_input, fused_axis = ("query", "key", "value"), -2
    by_head = False

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
        inputs = q * self.scale, k, v, window.bias, window, cache
        if not self.by_head or x.shape[0] * x.shape[1] >= MANY_FRAMES:
            y, cache = cached_attention(*inputs)
            return self.out(y), cache
        y, cache = cached_attention(*inputs, heads_first)
        heads, *frames, size = y.shape
        of_head = ((2,), (1,)), ((0,), (0,))
        shares = jax.lax.dot_general(
            y.reshape(heads, -1, size),
            self.out.kernel[...].astype(y.dtype),
            of_head,
            preferred_element_type=jnp.float32,
        )
        out = shares.sum(0).reshape(*frames, -1)
        assert self.out.bias is not None
        return (out + self.out.bias[...]).astype(self.out.output or x.dtype), cache


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

    def shift_at(self, time: Array) -> Array:
        """What a time adds to all frames: embedded time [B, 4C] -> [B, C]."""
        return self.time(jax.nn.mish(time))

    def join_skip(self, donate: bool = False) -> None:
        """Make the skip connection a part of the first convolution, which has the same inputs.

        In the longer kernel, its matrix stands at the last of the K places in time, and zeros stand
        at the others. donate: see `freed`.
        """
        conv: Any = self.conv1.conv
        skip: Any = self.skip
        kernel, matrix = conv.kernel[...], skip.kernel[...]
        rest = jnp.zeros_like(kernel[..., 1:, :, :])
        last = jnp.concatenate([rest, matrix[..., None, :, :]], -3)
        joined = jnp.concatenate([kernel, last], -1)
        conv.kernel = conv.kernel.replace(freed([kernel, matrix], joined, donate))
        biases = [conv.bias[...], skip.bias[...]]
        conv.bias = conv.bias.replace(freed(biases, jnp.concatenate(biases, -1), donate))
        self.skip = None

    def enter(
        self, x: Array, window: Window, cache: Maybe[ConvCache]
    ) -> tuple[Array, Array, Maybe[ConvCache]]:
        """x [B, T, C_in] through the first convolution and through the skip connection.

        Returns both, [B, T, C] each, and the convolution's cache.
        """
        if self.skip is not None:
            y, cache = self.conv1(x, window, cache)
            return y, self.skip(x * window.valid[..., None]), cache
        y, cache = self.conv1.conv(x * window.valid[..., None], window, cache)
        y, skip = jnp.split(y, 2, -1)
        return self.conv1.activate(y, window), skip, cache

    def empty_convs(self, batch: int, dtype) -> StageConvs:
        """The caches of the convolutions before an utterance's first window."""
        return StageConvs(
            self.conv1.conv.empty_cache(batch, dtype), self.conv2.conv.empty_cache(batch, dtype)
        )

    def __call__(
        self,
        x: Array,
        shift: Array,
        window: Window,
        cache: Maybe[StageCache],
        remat: str = "full",
    ) -> tuple[Array, Maybe[StageCache]]:
        """x [B, T, C_in], shift [B or 1, C] (`shift_at`) -> ([B, T, C], cache)."""
        y, skip, conv1 = self.enter(x, window, cache and cache.convs.conv1)
        y = y + shift[:, None]
        y, conv2 = self.conv2(y, window, cache and cache.convs.conv2)
        y = y + skip
        y, kv = run_blocks(self.blocks, y, window, cache and cache.kv, remat)
        if cache is None:
            return y, cache
        return y, StageCache(StageConvs(conv1, conv2), kv)


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

    def empty_convs(self, batch: int, dtype) -> EstimatorConvs:
        """The caches of the convolutions in one Euler step of an utterance's first window."""

        def middle(stage: Stage, carry, _):
            return carry, stage.empty_convs(batch, dtype)

        return EstimatorConvs(
            down=self.down.empty_convs(batch, dtype),
            down_conv=self.down_conv.empty_cache(batch, dtype),
            middle=scan(self.middle, middle, None)[1],
            up=self.up.empty_convs(batch, dtype),
            up_conv=self.up_conv.empty_cache(batch, dtype),
            final=self.final.conv.empty_cache(batch, dtype),
        )

    def empty_cache(self, batch: int, capacity: int, dtype) -> EstimatorCache:
        """A cache of `capacity` mel frames for each of `batch` rows and each Euler step.

        dtype: of the cache. Keys and values that are computed in another dtype are kept in that.
        """
        c = self.config
        shape = (batch, c.estimator_heads, capacity, c.estimator_head_size)
        blocks: Any = self.down.blocks
        kv_dtype = (blocks[0] if self.is_listed else blocks).attention_norm.output or dtype
        convs = self.empty_convs(batch, dtype)
        if self.is_listed:
            convs = packed(convs)
        return EstimatorCache(
            convs=jax.tree.map(lambda leaf: jnp.zeros((c.steps, *leaf.shape), dtype), convs),
            kv=RingKVCache.empty(self.layers, c.steps, shape, kv_dtype, self.is_listed),
        )

    @property
    def is_listed(self) -> bool:
        """Whether stages and their blocks are listed, as for GPUs."""
        return is_unrolled(self.down.blocks)

    def shifts(self, t: Array) -> Array | None:
        """What times t [B] add in each stage, [B, stages, C]; None unless blocks are listed.

        A GPU then reads the matrices of the time once for all Euler steps.
        """
        if not self.is_listed:
            return None
        assert is_unrolled(self.middle)
        time = self.time(t)
        stages = (self.down, *self.middle, self.up)
        return jnp.stack([stage.shift_at(time) for stage in stages], 1)

    def __call__(
        self,
        x: Array,
        cond: Array,
        t: Array,
        window: Window,
        cache: Maybe[EstimatorCache],
        remat: str = "full",
        shifts: Array | None = None,
    ) -> tuple[Array, Maybe[EstimatorCache]]:
        """Mel x [B, T, M] at time t [B or 1] and its conditions -> (dx/dt [B, T, M], cache).

        cond [B, T, 3M]: the encoder's mel, the speaker, the prompt's mel. The cache is that of one
        Euler step: its convolutions, and the key/value cache at the step's first layer, from where
        it advances by one with every block. remat: see `run_blocks`. shifts: those of t, if they
        are known.
        """
        valid = window.valid[..., None]
        time: Any = self.time(t) if shifts is None else None
        convs, kv = (NO_CACHE, NO_CACHE) if cache is None else (cache.convs, cache.kv)
        is_packed = isinstance(convs, ConvCache)
        if isinstance(convs, ConvCache):
            dtype = convs.inputs.dtype
            convs = unpacked(convs, jax.eval_shape(lambda: self.empty_convs(len(x), dtype)))

        def run(stage: Stage, carry, xs: tuple[Maybe[StageConvs], Array | None]):
            """One stage: ((x, kv), (its convolutions, its shift)) -> the same after it."""
            (x, kv), (convs, shift) = carry, xs
            shift = stage.shift_at(time) if shift is None else shift
            x, cache = stage(x, shift, window, kv and StageCache(convs, kv), remat)
            return (x, cache and cache.kv), cache and cache.convs

        x = jnp.concatenate([x, cond], -1)
        first = inner = last = None
        if shifts is not None:
            first, inner, last = shifts[0], shifts[1:-1], shifts[-1]
        (skip, kv), down = run(self.down, (x, kv), (convs and convs.down, first))
        x, down_conv = self.down_conv(skip * valid, window, convs and convs.down_conv)
        (x, kv), middle = scan(self.middle, run, (x, kv), (convs and convs.middle, inner))
        x = jnp.concatenate([x, skip], -1)
        (x, kv), up = run(self.up, (x, kv), (convs and convs.up, last))
        x, up_conv = self.up_conv(x * valid, window, convs and convs.up_conv)
        x, final = self.final(x, window, convs and convs.final)
        velocity = self.out(x) * valid
        if cache is None:
            return velocity, cache
        after = EstimatorConvs(down, down_conv, middle, up, up_conv, final)
        return velocity, EstimatorCache(packed(after) if is_packed else after, kv)

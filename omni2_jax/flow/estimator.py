"""The flow's estimator: where a noisy mel is heading at time t. A causal UNet whose blocks are convolutions and transformers.

B rows, T frames of the window, S frames that can be seen, M mel bins, C channels, N heads, H head size. The UNet of CosyVoice2 has one
level and never changes the frame rate: down, middle and up are stages in a row, with one skip connection.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.flow.context import CausalConv, Window, attend
from omni2_jax.layers import LayerNorm, Linear, scan, stack

Array = jax.Array


class TimeEmbedding(nnx.Module):
    """Time in [0, 1], [B] -> [B, 4C]. References: Matcha-TTS's SinusoidalPosEmb (scale 1000) and TimestepEmbedding."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.width = 4 * config.mels  # that of the estimator's input
        self.linear1 = Linear(rngs, (self.width, 4 * config.channels), (None, "embed"))
        self.linear2 = Linear(rngs, (4 * config.channels, 4 * config.channels), ("embed", None))

    def __call__(self, t: Array) -> Array:
        half = self.width // 2
        angle = 1000 * t[:, None] * jnp.exp(jnp.arange(half) * (-math.log(10000.0) / (half - 1)))
        return self.linear2(jax.nn.silu(self.linear1(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))))


class ConvBlock(nnx.Module):
    """Causal convolution, layer norm, Mish; padding goes in and comes out as zeros (reference: CausalBlock1D)."""

    def __init__(self, c_in: int, c_out: int, rngs: nnx.Rngs):
        self.conv = CausalConv(rngs, 3, c_in, c_out)
        self.norm = LayerNorm(c_out)

    def __call__(self, x: Array, window: Window) -> Array:
        valid = window.valid[..., None]
        return jax.nn.mish(self.norm(self.conv(x * valid))) * valid


class Attention(nnx.Module):
    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c, n, h = config.channels, config.estimator_heads, config.estimator_head_size
        self.query = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.key = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.value = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.out = Linear(rngs, (n, h, c), ("heads", "head", "embed"), in_dims=2)

    def __call__(self, x: Array, window: Window) -> Array:
        q = self.query(x) * self.query.kernel.shape[-1] ** -0.5
        return self.out(attend(q, self.key(x), self.value(x), window.bias))


class Block(nnx.Module):
    """Pre-norm self-attention and GELU feed-forward, without positions (reference: BasicTransformerBlock)."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.attention_norm = LayerNorm(c)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(c)
        self.up = Linear(rngs, (c, 4 * c), ("embed", "hidden"))
        self.down = Linear(rngs, (4 * c, c), ("hidden", "embed"))

    def __call__(self, x: Array, window: Window) -> Array:
        x = x + self.attention(self.attention_norm(x), window)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))


class Stage(nnx.Module):
    """A residual pair of convolutions that is told the time, then transformer blocks (reference: CausalResnetBlock1D and what follows it)."""

    def __init__(self, config: FlowConfig, c_in: int, rngs: nnx.Rngs):
        c = config.channels
        self.conv1 = ConvBlock(c_in, c, rngs)
        self.time = Linear(rngs, (4 * c, c), (None, "embed"))
        self.conv2 = ConvBlock(c, c, rngs)
        self.skip = Linear(rngs, (c_in, c), (None, "embed"))
        self.blocks = stack(config.blocks, lambda r: Block(config, r), rngs)

    def __call__(self, x: Array, time: Array, window: Window) -> Array:
        """x [B, T, C_in], time [B or 1, 4C] -> [B, T, C]."""
        y = self.conv1(x, window) + self.time(jax.nn.mish(time))[:, None]
        x = self.conv2(y, window) + self.skip(x * window.valid[..., None])
        return scan(self.blocks, lambda block, x, _: (block(x, window), None), x)[0]


class Estimator(nnx.Module):
    """Reference: ConditionalDecoder with causal = True and one level of channels."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.time = TimeEmbedding(config, rngs)
        self.down = Stage(config, 4 * config.mels, rngs)
        self.down_conv = CausalConv(rngs, 3, c, c)
        self.middle = stack(config.mid_blocks, lambda r: Stage(config, c, r), rngs)
        self.up = Stage(config, 2 * c, rngs)
        self.up_conv = CausalConv(rngs, 3, c, c)
        self.final = ConvBlock(c, c, rngs)
        self.out = Linear(rngs, (c, config.mels), ("embed", None))

    def __call__(self, x: Array, given: Array, t: Array, window: Window) -> Array:
        """Mel x [B, T, M] at time t [B or 1] and what is given for it [B, T, 3M] (mu, speaker, prompt) -> dx/dt [B, T, M]."""
        time, valid = self.time(t), window.valid[..., None]
        x = skip = self.down(jnp.concatenate([x, given], -1), time, window)
        x = self.down_conv(x * valid)
        x, _ = scan(self.middle, lambda stage, x, _: (stage(x, time, window), None), x)
        x = self.up(jnp.concatenate([x, skip], -1), time, window)
        x = self.final(self.up_conv(x * valid), window)
        return self.out(x) * valid

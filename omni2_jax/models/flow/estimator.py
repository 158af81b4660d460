"""The flow's estimator: where a noisy mel is heading at time t. A causal UNet whose blocks are convolutions and transformers.

B rows, T frames of the window, S frames that can be seen, M mel bins, C channels, N heads, H head size. The UNet of CosyVoice2 has one
level and never changes the frame rate: down, middle and up are stages in a row, with one skip connection.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.context import CausalConv, Memory, Window, attend, run_blocks
from omni2_jax.models.layers import LayerNorm, Linear, scan, stack

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
        return self.linear2(
            jax.nn.silu(self.linear1(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
        )


class ConvBlock(nnx.Module):
    """Causal convolution, layer norm, Mish; padding goes in and comes out as zeros (reference: CausalBlock1D)."""

    def __init__(self, c_in: int, c_out: int, rngs: nnx.Rngs):
        self.conv = CausalConv(rngs, 3, c_in, c_out)
        self.norm = LayerNorm(c_out)

    def __call__(self, x: Array, window: Window, tail: Array | None) -> tuple[Array, Array | None]:
        valid = window.valid[..., None]
        y, tail = self.conv(x * valid, window, tail)
        return jax.nn.mish(self.norm(y)) * valid, tail


class Attention(nnx.Module):
    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c, n, h = config.channels, config.estimator_heads, config.estimator_head_size
        self.query = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.key = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.value = Linear(rngs, (c, n, h), ("embed", "heads", "head"), bias=False)
        self.out = Linear(rngs, (n, h, c), ("heads", "head", "embed"), in_dims=2)

    def __call__(
        self, x: Array, window: Window, memory: Memory | None, layer: Array
    ) -> tuple[Array, Memory | None]:
        q = self.query(x) * self.query.kernel.shape[-1] ** -0.5
        y, memory = attend(q, self.key(x), self.value(x), window.bias, window, memory, layer)
        return self.out(y), memory


class Block(nnx.Module):
    """Pre-norm self-attention and GELU feed-forward, without positions (reference: BasicTransformerBlock)."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.attention_norm = LayerNorm(c)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(c)
        self.up = Linear(rngs, (c, 4 * c), ("embed", "hidden"))
        self.down = Linear(rngs, (4 * c, c), ("hidden", "embed"))

    def __call__(
        self, x: Array, window: Window, memory: Memory | None, layer: Array
    ) -> tuple[Array, Memory | None]:
        y, memory = self.attention(self.attention_norm(x), window, memory, layer)
        x = x + y
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)), memory


class Stage(nnx.Module):
    """A residual pair of convolutions that is told the time (reference: CausalResnetBlock1D), then transformer blocks."""

    def __init__(self, config: FlowConfig, c_in: int, rngs: nnx.Rngs):
        c = config.channels
        self.conv1 = ConvBlock(c_in, c, rngs)
        self.time = Linear(rngs, (4 * c, c), (None, "embed"))
        self.conv2 = ConvBlock(c, c, rngs)
        self.skip = Linear(rngs, (c_in, c), (None, "embed"))
        self.blocks = stack(config.blocks, lambda r: Block(config, r), rngs)

    def tails(self, batch: int, dtype) -> tuple[Array, Array]:
        return self.conv1.conv.tail(batch, dtype), self.conv2.conv.tail(batch, dtype)

    def __call__(
        self, x: Array, time: Array, window: Window, tails, memory: Memory | None, layers: Array
    ):
        """x [B, T, C_in], time [B or 1, 4C] -> ([B, T, C], memory), tails; `layers`: where the memory has the blocks."""
        y, tail1 = self.conv1(x, window, tails[0])
        y, tail2 = self.conv2(y + self.time(jax.nn.mish(time))[:, None], window, tails[1])
        x = y + self.skip(x * window.valid[..., None])
        return run_blocks(self.blocks, x, window, memory, layers), (tail1, tail2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tails:
    """The inputs [B, 2, C] of every convolution before the window; of a stage, those of its two convolutions."""

    axes: ClassVar = ("batch", None, None)  # of each Euler step and stage
    down: tuple = (None, None)
    down_conv: Array | None = None
    middle: tuple = (None, None)
    up: tuple = (None, None)
    up_conv: Array | None = None
    final: Array | None = None


class Estimator(nnx.Module):
    """Reference: ConditionalDecoder with causal = True and one level of channels."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        c = config.channels
        self.layers = config.mid_blocks + 2, config.blocks
        self.time = TimeEmbedding(config, rngs)
        self.down = Stage(config, 4 * config.mels, rngs)
        self.down_conv = CausalConv(rngs, 3, c, c)
        self.middle = stack(config.mid_blocks, lambda r: Stage(config, c, r), rngs)
        self.up = Stage(config, 2 * c, rngs)
        self.up_conv = CausalConv(rngs, 3, c, c)
        self.final = ConvBlock(c, c, rngs)
        self.out = Linear(rngs, (c, config.mels), ("embed", None))

    def tails(self, batch: int, dtype) -> Tails:
        """Before an utterance's first window."""
        _, middle = scan(
            self.middle, lambda stage, carry, _: (carry, stage.tails(batch, dtype)), None
        )
        return Tails(
            self.down.tails(batch, dtype),
            self.down_conv.tail(batch, dtype),
            middle,
            self.up.tails(batch, dtype),
            self.up_conv.tail(batch, dtype),
            self.final.conv.tail(batch, dtype),
        )

    def __call__(
        self,
        x: Array,
        given: Array,
        t: Array,
        window: Window,
        past: Tails | None = None,
        memory: Memory | None = None,
        first: Array | int = 0,
    ) -> tuple[Array, Tails, Memory | None]:
        """Mel x [B, T, M] at time t [B or 1] and what is given for it [B, T, 3M] (mu, speaker, prompt) -> dx/dt [B, T, M].

        A window with a past has tails and a memory, from whose layer `first` on the blocks lie; both come back for the next one.
        """
        past, time, valid = past or Tails(), self.time(t), window.valid[..., None]
        layers = first + jnp.arange(math.prod(self.layers)).reshape(self.layers)
        (skip, memory), down = self.down(
            jnp.concatenate([x, given], -1), time, window, past.down, memory, layers[0]
        )
        x, down_conv = self.down_conv(skip * valid, window, past.down_conv)
        stages = past.middle, layers[1:-1]
        (x, memory), middle = scan(
            self.middle,
            lambda stage, c, xs: stage(c[0], time, window, xs[0], c[1], xs[1]),
            (x, memory),
            stages,
        )
        (x, memory), up = self.up(
            jnp.concatenate([x, skip], -1), time, window, past.up, memory, layers[-1]
        )
        x, up_conv = self.up_conv(x * valid, window, past.up_conv)
        x, final = self.final(x, window, past.final)
        return self.out(x) * valid, Tails(down, down_conv, middle, up, up_conv, final), memory

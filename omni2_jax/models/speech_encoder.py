"""Whisper's encoder: log-mel [B, 2T, M] -> frames [B, T, D], T = 1500 for 30 s.

Every training stage freezes it.

B batch, T frames, M mel bins, D width. Reference: whisper.model.AudioEncoder.
"""

import jax
from flax import nnx

from omni2_jax.config import SpeechEncoderConfig, SpeechTokenizerConfig
from omni2_jax.config.parts import WeightType
from omni2_jax.models.layers import Conv1d, LayerNorm, Linear, attention, param
from omni2_jax.models.stacks import scan, stack
from omni2_jax.sharding import constrain

Array = jax.Array


def gelu(x: Array) -> Array:
    """The exact GELU, as Whisper has it; JAX's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


class Block(nnx.Module):
    """Self-attention over all frames, then a feed-forward network, each plus its input.

    scale: of the initial values of the matrices whose outputs are added to the input.
    """

    def __init__(
        self,
        config: SpeechEncoderConfig | SpeechTokenizerConfig,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        weights: WeightType = "float",
    ):
        d, n = config.width, config.heads
        h, f = d // n, config.hidden or 4 * d
        axes, out_axes = ("embed", "heads", "head"), ("heads", "head", "embed")
        self.attention_norm = LayerNorm(d)
        self.query = Linear(rngs, (d, n, h), axes, weights=weights)
        self.key = Linear(rngs, (d, n, h), axes, bias=False, weights=weights)
        self.value = Linear(rngs, (d, n, h), axes, weights=weights)
        self.out = Linear(rngs, (n, h, d), out_axes, in_dims=2, scale=scale, weights=weights)
        self.mlp_norm = LayerNorm(d)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"), weights=weights)
        self.down = Linear(rngs, (f, d), ("hidden", "embed"), scale=scale, weights=weights)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        y = self.attention_norm(x)
        x = x + self.out(attention(self.query(y), self.key(y), self.value(y)))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class SpeechEncoder(nnx.Module):
    """Two convolutions, learned positions, and Whisper's blocks; its frames are 20 ms apart."""

    def __init__(self, config: SpeechEncoderConfig, rngs: nnx.Rngs):
        self.conv1 = Conv1d(
            rngs, (3, config.mels, config.width), padding=(1, 1), axes=(None, None, "embed")
        )
        self.conv2 = Conv1d(
            rngs,
            (3, config.width, config.width),
            stride=2,
            padding=(1, 1),
            axes=(None, None, "embed"),
        )
        self.positions = param(
            rngs, (config.frames, config.width), (None, "embed"), fan_in=config.width
        )
        scale = (2 * config.layers) ** -0.5
        self.blocks = stack(config.layers, lambda r: Block(config, r, scale, config.weights), rngs)
        self.norm = LayerNorm(config.width)

    def embed(self, mel: Array) -> Array:
        """Log-mel [B, 2T, M] -> the input of the first block [B, T, D]."""
        x = gelu(self.conv2(gelu(self.conv1(mel))))
        return x + self.positions[...].astype(x.dtype)

    def __call__(self, mel: Array) -> Array:
        """Log-mel [B, 2T, M] with T = `config.frames` -> frames [B, T, D]."""

        def run(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return constrain(block(x), "batch", None, None), None

        x, _ = scan(self.blocks, run, self.embed(mel))
        return self.norm(x)

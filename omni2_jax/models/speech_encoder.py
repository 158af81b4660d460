"""Whisper's encoder: log-mel [B, 2T, M] -> frames [B, T, D], T = 1500 for 30 s. It stays frozen in every training stage."""

import jax
from flax import nnx

from omni2_jax.config import SpeechEncoderConfig
from omni2_jax.models.layers import Conv1d, LayerNorm, Linear, attend, param, scan, stack
from omni2_jax.sharding import constrain

Array = jax.Array


def gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Block(nnx.Module):
    def __init__(self, config: SpeechEncoderConfig, rngs: nnx.Rngs):
        d, n, h, f = (
            config.width,
            config.heads,
            config.width // config.heads,
            config.hidden or 4 * config.width,
        )
        self.attention_norm = LayerNorm(d)
        self.query = Linear(rngs, (d, n, h), ("embed", "heads", "head"))
        self.key = Linear(rngs, (d, n, h), ("embed", "heads", "head"), bias=False)
        self.value = Linear(rngs, (d, n, h), ("embed", "heads", "head"))
        self.out = Linear(rngs, (n, h, d), ("heads", "head", "embed"), in_dims=2)
        self.mlp_norm = LayerNorm(d)
        self.up = Linear(rngs, (d, f), ("embed", "hidden"))
        self.down = Linear(rngs, (f, d), ("hidden", "embed"))

    def __call__(self, x: Array) -> Array:
        y = self.attention_norm(x)
        x = x + self.out(attend(self.query(y), self.key(y), self.value(y)))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class SpeechEncoder(nnx.Module):
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
        self.blocks = stack(config.layers, lambda r: Block(config, r), rngs)
        self.norm = LayerNorm(config.width)

    def embed(self, mel: Array) -> Array:
        """Log-mel [B, 2T, M] -> the residual stream before the first block [B, T, D]."""
        x = gelu(self.conv2(gelu(self.conv1(mel))))
        return x + self.positions[...].astype(x.dtype)

    def __call__(self, mel: Array) -> Array:
        """Log-mel [B, 2T, M], exactly `frames` * 2 long -> [B, T, D]."""
        x, _ = scan(
            self.blocks,
            lambda block, x, _: (constrain(block(x), "batch", None, None), None),
            self.embed(mel),
        )
        return self.norm(x)

"""Speech adapter: five encoder frames become one LLM embedding (paper section 2.1)."""

import jax
from flax import nnx

from omni2_jax.config import AdapterConfig
from omni2_jax.models.layers import Linear


class Adapter(nnx.Module):
    """Two linear layers with a ReLU over groups of `stride` frames: 1500 frames become 300."""

    def __init__(self, config: AdapterConfig, encoder_width: int, llm_width: int, rngs: nnx.Rngs):
        self.stride = config.stride
        self.up = Linear(rngs, (config.stride * encoder_width, config.hidden), ("embed", "hidden"))
        self.down = Linear(rngs, (config.hidden, llm_width), ("hidden", "embed"))

    def __call__(self, frames: jax.Array) -> jax.Array:
        """[B, T, E] -> [B, T // stride, D]; last frames that do not fill a group are dropped."""
        batch, time, width = frames.shape
        groups = time // self.stride
        x = frames[:, : groups * self.stride].reshape(batch, groups, self.stride * width)
        return self.down(jax.nn.relu(self.up(x)))

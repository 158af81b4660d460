"""What a stretch of frames sees: its own chunk, chunks before it, and what causal layers keep of those.

B rows, T frames of the stretch, S frames that can be seen, N heads, H head size, C channels, L layers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.layers import Conv1d

Array = jax.Array

UNSEEN = -1e30  # finite: a padded frame may see nothing at all, and must not turn into nan


@dataclass(frozen=True)
class Chunks:
    """A unit sees its own chunk of `size` units and `left` chunks before it (None: all of them).

    The first chunk is `shift` units shorter. With shift = look-ahead, units that arrive `size` at a time complete
    exactly one chunk each time.
    """

    size: int
    left: int | None = None
    shift: int = 0

    def sees(self, query: Array, key: Array, rate: int) -> Array:
        """Whether frames `query` [B, T] see frames `key` [B, S], `rate` frames to a unit, -1 = no such frame: bool [B, T, S]."""
        own, other = ((index // rate + self.shift) // self.size for index in (query[:, :, None], key[:, None, :]))
        seen = (other <= own) & (key >= 0)[:, None, :]
        return seen if self.left is None else seen & (other >= own - self.left)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The stretch of frames that a call computes. The whole utterance has no past: its keys are its own frames."""

    valid: Array  # [B, T] bool: the frame exists
    query: Array  # [B, T] its index
    key: Array  # [B, S] the index of each key
    bias: Array  # [B, 1, T, S] float32, 0 where a frame sees a key

    @classmethod
    def whole(cls, frames: int, lengths: Array, chunks: Chunks, rate: int) -> "Window":
        """All frames of right-padded utterances of `lengths` [B] frames."""
        index = jnp.broadcast_to(jnp.arange(frames), (lengths.shape[0], frames))
        valid = index < lengths[:, None]
        bias = jnp.where(chunks.sees(index, index, rate) & valid[:, None, :], 0.0, UNSEEN)
        return cls(valid, index, index, bias[:, None])


class CausalConv(Conv1d):
    """A convolution over each frame and the K - 1 frames before it, [B, T, C] -> [B, T, C']."""

    def __init__(self, rngs: nnx.Rngs, size: int, c_in: int, c_out: int):
        super().__init__(rngs, (size, c_in, c_out), padding=(size - 1, 0), axes=(None, None, "embed"))


def attend(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Softmax attention of scaled q [B, T, N, H] over k, v [B, S, N, H] -> [B, T, N, H]; bias broadcasts to [B, N, T, S]."""
    weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k) + bias, -1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)

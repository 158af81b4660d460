"""The flow's causal convolution, over a whole utterance or window by window with a ConvCache."""

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.flow.cache import ConvCache
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.row_conv import RowConv1d

Array = jax.Array


class CausalConv(RowConv1d):
    """A convolution over each frame and the K - 1 frames before it, [B, T, C] -> [B, T, C']."""

    def __init__(self, rngs: nnx.Rngs, size: int, c_in: int, c_out: int):
        super().__init__(rngs, (size, c_in, c_out), axes=(None, None, "embed"))

    def empty_cache(self, batch: int, dtype) -> ConvCache:
        """Zeros; where layers are stacked, with their axis in front."""
        *layers, size, channels, _ = self.kernel.shape
        return ConvCache(jnp.zeros((*layers, batch, size - 1, channels), dtype))

    def __call__(
        self, x: Array, window: Window, cache: ConvCache | None
    ) -> tuple[Array, ConvCache | None]:
        """x [B, T, C] of the window's frames -> ([B, T, C'], cache for the frames after them).

        The inputs before an utterance's first frame are zeros. Only finished frames
        (Window.num_finished) enter the cache. Example: K = 3, T = 4, of which 2 are finished.

            In:  cache a b   x c d e f
            Out: cache c d   y of abc bcd cde def
        """
        if cache is None:
            return super().__call__(
                jnp.pad(x, ((0, 0), (self.kernel.shape[0] - 1, 0), (0, 0)))
            ), None
        before = cache.inputs
        x = jnp.concatenate(
            [jnp.where(window.query[:, :1, None] > 0, before, 0).astype(x.dtype), x], 1
        )

        def cut(row: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(row, start, before.shape[1])

        after = jax.vmap(cut)(x, window.num_finished).astype(before.dtype)
        after = jnp.where(window.num_finished[:, None, None] > 0, after, before)
        return super().__call__(x), ConvCache(after)

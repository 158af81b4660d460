"""The flow's causal convolution, over a whole utterance or window by window with a ConvCache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.flow.cache import ConvCache, Maybe
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.layers import Conv1d

Array = jax.Array


def by_row(conv: Callable[[Array], Array], x: Array) -> Array:
    """conv(x) for x [B, T, C], bit-equal for equal rows: on a CPU, one row at a time.

    XLA's convolution for CPUs cuts the frames of all rows, B * T of them, into tiles, and rounds
    the last, smaller tile differently. On processors with AVX2 but without AVX-512, the last frames
    of the last row then differ by 1e-6 from the same frames in another row, and the samples by
    3e-3, since the vocoder adds up the pitch of its frames. Matrix products do not do this.
    """

    def one_row(row: Array) -> Array:
        return conv(row[None])[0]

    def row_by_row(x: Array) -> Array:
        return jax.lax.map(one_row, x)

    if len(x) == 1:
        return conv(x)
    return jax.lax.platform_dependent(x, cpu=row_by_row, default=conv)


class CausalConv(Conv1d):
    """A convolution over each frame and the K - 1 frames before it, [B, T, C] -> [B, T, C']."""

    def __init__(self, rngs: nnx.Rngs, size: int, c_in: int, c_out: int):
        super().__init__(rngs, (size, c_in, c_out), axes=(None, None, "embed"))
        self.before = (size - 1, c_in)  # of the inputs before the first one of a window

    def empty_cache(self, batch: int, dtype) -> ConvCache:
        """Zeros; where layers are stacked, with their axis in front."""
        return ConvCache(jnp.zeros((*self.kernel.shape[:-3], batch, *self.before), dtype))

    def __call__(
        self, x: Array, window: Window, cache: Maybe[ConvCache]
    ) -> tuple[Array, Maybe[ConvCache]]:
        """x [B, T, C] of the window's frames -> ([B, T, C'], cache for the frames after them).

        The inputs before an utterance's first frame are zeros. Only finished frames
        (Window.num_finished) enter the cache. Example: K = 3, T = 4, of which 2 are finished.

            In:  cache a b   x c d e f
            Out: cache c d   y of abc bcd cde def
        """
        if cache is None:
            return super().__call__(jnp.pad(x, ((0, 0), (self.before[0], 0), (0, 0)))), cache
        assert window.num_finished is not None
        before = cache.inputs
        x = jnp.concatenate(
            [jnp.where(window.query[:, :1, None] > 0, before, 0).astype(x.dtype), x], 1
        )

        def cut(row: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(row, start, before.shape[1])

        after = jax.vmap(cut)(x, window.num_finished).astype(before.dtype)
        after = jnp.where(window.num_finished[:, None, None] > 0, after, before)
        return by_row(super().__call__, x), ConvCache(after)

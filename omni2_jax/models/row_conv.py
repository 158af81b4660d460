"""A convolution whose rows are bit-equal wherever they are in the batch, also on CPUs.

On a CPU, XLA hands a convolution to a library that cuts the rows of all slots, B * T of them, into
tiles, and rounds a last, smaller tile in another order. On processors with AVX2 but not AVX-512,
the last frames of the last slot then differ by 1e-6 from the same frames in another slot. In the
flow and the vocoder that is audible in numbers: the pitch of a frame is added up in the source's
phase, and samples differ by 3e-3. A matrix product has no such tiles, so on CPUs the convolution
is computed as one.
"""

import jax
import jax.numpy as jnp

from omni2_jax.models.layers import Conv1d

Array = jax.Array


class RowConv1d(Conv1d):
    """Conv1d, [B, T, C] -> [B, T', C'], without dependence on a row's place. No groups."""

    def __call__(self, x: Array) -> Array:
        return jax.lax.platform_dependent(x, cpu=self.as_product, default=super().__call__)

    def as_product(self, x: Array) -> Array:
        """The convolution as a product of all windows, [B, T', K * C], with the kernel."""
        kernel = self.kernel[...].astype(x.dtype)
        size, _, channels = kernel.shape
        x = jnp.pad(x, ((0, 0), self.padding, (0, 0)))
        count = (x.shape[1] - self.dilation * (size - 1) - 1) // self.stride + 1
        length = (count - 1) * self.stride + 1
        starts = range(0, size * self.dilation, self.dilation)
        windows = [x[:, start : start + length : self.stride] for start in starts]
        y = jnp.concatenate(windows, -1) @ kernel.reshape(-1, channels)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

"""The layers that all parts are made of.

B batch, T query time, S key time, D width, N heads, K key/value heads, H head size.

A module computes in the dtype of its input and casts its weights to it (a no-op when they agree),
so the caller chooses the precision. Each parameter carries `axes`, its logical axis names;
`sharding.RULES` maps those to the mesh.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config.parts import WeightType

Array = jax.Array

LORA_SCALE = 2.0  # alpha / rank
# The score of a key that is not attended to, or what is added to it. It is finite: the softmax of a
# fully masked (padded) row would be NaN with -inf.
MASKED = -1e30


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str | None],
    fan_in: int | None = None,
    scale: float = 1.0,
) -> nnx.Param:
    """A float32 parameter: normal with deviation scale / sqrt(fan_in); zeros without a fan-in.

    The values matter only where training starts from them: `omni2 new`, which draws them itself
    (`convert.start.fresh`), and the setting `reset`.
    """
    if fan_in is None:
        return constant(shape, axes, 0.0)
    values = scale * jax.random.normal(rngs.params(), tuple(shape)) / math.sqrt(fan_in)
    return nnx.Param(values, axes=tuple(axes), deviation=scale / math.sqrt(fan_in))


@dataclass(frozen=True)
class Identity:
    """Initial values that copy the first inputs to the outputs.

    causal: of a causal convolution [K, C_in, C_out], which copies the last of its K inputs;
    otherwise of a matrix [C_in, C_out].
    """

    causal: bool = False

    def values(self, shape: Sequence[int]) -> np.ndarray:
        """float32 of a shape, in which axes of stacked layers may be in front."""
        values = np.zeros(shape, np.float32)
        last = values[..., -1, :, :] if self.causal else values
        last[...] = np.eye(shape[-2], shape[-1])
        return values


Initial = float | tuple[Any, ...] | Identity


def initial_values(value: Initial, shape: Sequence[int]) -> np.ndarray:
    """A parameter's initial values, float32: a number or nested tuples of them are broadcast."""
    if isinstance(value, Identity):
        return value.values(shape)
    return np.broadcast_to(np.asarray(value, np.float32), tuple(shape)).copy()


def constant(shape: Sequence[int], axes: Sequence[str | None], value: Initial) -> nnx.Param:
    """A float32 parameter that training always starts from the same values."""
    values = jnp.asarray(initial_values(value, shape))
    return nnx.Param(values, axes=tuple(axes), initial=value)


def int8(shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
    """A parameter of integers from -127 to 127, which are multiplied by a scale of their own."""
    return nnx.Param(jnp.zeros(tuple(shape), jnp.int8), axes=tuple(axes))


class Linear(nnx.Module):
    """y[..., out] = x[..., in] kernel[in, out] + bias[out]; `in` and `out` may be several axes.

    in_dims: how many leading axes of `shape` are `in`. axes: the logical names of all of them.
    rank: of a low-rank update beside the kernel, LORA_SCALE * low[in, rank] high[rank, out], zero
    at first (LoRA, arXiv 2106.09685). scale: of the kernel's initial values (`param`).
    weights: "int8" is a kernel of integers whose products are multiplied by kernel_scale[out]
    afterwards, so that a byte is read for each weight; such a kernel is not trained.
    transposed: the kernel is [out, in] (`transpose`). output: the dtype of y, by default that of x.
    """

    transposed = False
    output: jnp.dtype | None = None

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        axes: Sequence[str | None],
        in_dims: int = 1,
        bias: bool = True,
        rank: int = 0,
        scale: float = 1.0,
        weights: WeightType = "float",
    ):
        self.in_dims = in_dims
        fan_in = math.prod(shape[:in_dims])
        is_int8 = weights == "int8"
        self.kernel = int8(shape, axes) if is_int8 else param(rngs, shape, axes, fan_in, scale)
        self.kernel_scale = constant(shape[in_dims:], axes[in_dims:], 1.0) if is_int8 else None
        self.bias = param(rngs, shape[in_dims:], axes[in_dims:]) if bias else None
        self.low = (
            param(rngs, (*shape[:in_dims], rank), (*axes[:in_dims], None), fan_in) if rank else None
        )
        self.high = param(rngs, (rank, *shape[in_dims:]), (None, *axes[in_dims:])) if rank else None

    def __call__(self, x: Array) -> Array:
        y = contract(x, self.kernel[...], self.in_dims, self.transposed)
        if self.kernel_scale is not None:
            y = y * self.kernel_scale[...].astype(x.dtype)
        if self.low is not None and self.high is not None:
            low = contract(x, self.low[...], self.in_dims)
            y = y + LORA_SCALE * contract(low, self.high[...], 1)
        y = y.astype(self.output or x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def transpose(self, donate: bool = False) -> None:
        """Put the axes `out` before `in`, behind those of stacked layers. donate: see `freed`.

        With one row, a GPU then sums along the memory, in one kernel. Of a kernel [in, out] it sums
        parts of the inputs first, and these in a second kernel.
        """
        kernel, axes = self.kernel[...], self.kernel.get_metadata("axes")
        first = kernel.ndim - len(axes)
        inputs = tuple(range(first, first + self.in_dims))
        moved = jnp.moveaxis(kernel, inputs, tuple(range(-self.in_dims, 0)))
        self.kernel = self.kernel.replace(
            freed([kernel], moved, donate),
            axes=(*axes[self.in_dims :], *axes[: self.in_dims]),
        )
        self.transposed = True

    def to_float(self, donate: bool = False) -> None:
        """Multiply an int8 kernel by its scales, once for all calls. donate: see `freed`."""
        if self.kernel_scale is None:
            return
        kernel, scale = self.kernel[...], self.kernel_scale[...]
        first = kernel.ndim - len(self.kernel.get_metadata("axes"))  # behind stacked layers
        scales = jnp.expand_dims(scale, tuple(range(first, first + self.in_dims)))
        product = kernel.astype(scale.dtype) * scales
        self.kernel = self.kernel.replace(freed([kernel, scale], product, donate))
        self.kernel_scale = None


def contract(x: Array, kernel: Array, dims: int, transposed: bool = False) -> Array:
    """The last `dims` axes of x against the first ones of the kernel, in x's dtype.

    transposed: against the last ones of the kernel.
    The axes before them become one: a CPU takes half of the time for the gradient of a matrix if
    it sums over one axis instead of two.
    """
    before, inner = x.shape[: x.ndim - dims], x.shape[x.ndim - dims :]
    first = kernel.ndim - dims if transposed else 0
    axes = (tuple(range(1, dims + 1)), tuple(range(first, first + dims)))
    rows = x.reshape(-1, *inner)
    y = jax.lax.dot_general(rows, kernel.astype(x.dtype), (axes, ((), ())))
    return y.reshape(*before, *y.shape[1:])


class Conv1d(nnx.Module):
    """Convolution over time, [B, T, C_in] -> [B, T', C_out].

    shape: of the kernel, [K, C_in / groups, C_out]. padding: (left, right) in time steps.
    scale: of the kernel's initial values (`param`). transposed: the kernel is
    [C_out, K, C_in / groups] (`transpose`).
    """

    transposed = False

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: Sequence[int],
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        bias: bool = True,
        axes: Sequence[str | None] = (None, None, None),
        scale: float = 1.0,
    ):
        self.stride, self.dilation = stride, dilation
        self.padding, self.groups = padding, groups
        self.kernel = param(rngs, shape, axes, shape[0] * shape[1], scale)
        self.bias = param(rngs, shape[2:], axes[2:]) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride,),
            padding=(self.padding,),
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NHC", "OHI" if self.transposed else "HIO", "NHC"),
            feature_group_count=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def transpose(self, donate: bool = False) -> None:
        """Put the axis C_out first, behind those of stacked layers. donate: see `freed`.

        A GPU's convolutions read kernels in this order; of any other XLA makes a copy in each call.
        """
        kernel, axes = self.kernel[...], self.kernel.get_metadata("axes")
        moved = jnp.moveaxis(kernel, -1, -3)
        self.kernel = self.kernel.replace(
            freed([kernel], moved, donate), axes=(axes[-1], *axes[:-1])
        )
        self.transposed = True


class DepthwiseConv1d(Conv1d):
    """A convolution of stride 1 with one filter for each channel: shape [K, 1, C], groups C.

    It is a sum of K shifted inputs. On a CPU that takes 1/50 of the time of XLA's convolution
    (31 taps, 128 and 1280 channels), with gradients 1/5.
    """

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        padded = jnp.pad(x, ((0, 0), self.padding, (0, 0)))
        size = padded.shape[1] - len(kernel) + 1
        y = padded[:, :size] * kernel[0, 0]
        for tap in range(1, len(kernel)):
            y = y + padded[:, tap : tap + size] * kernel[tap, 0]
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, computed in float32. scale: its initial factors.

    output: the dtype of the result, by default that of the input.
    """

    output: jnp.dtype | None = None

    def __init__(self, size: int, eps: float = 1e-5, axis: str | None = None, scale: float = 1.0):
        self.eps = eps
        self.scale = constant((size,), (axis,), scale)
        self.bias = constant((size,), (axis,), 0.0)

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.output or x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float = 1e-6, axis: str | None = None):
        self.eps = eps
        self.scale = constant((size,), (axis,), 1.0)

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
        return y * self.scale[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [V, D]: ids [...] -> [..., D].

    weights: see `Linear`; "int8" has a scale for each row.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        vocabulary: int,
        width: int,
        axes: Sequence[str | None] = ("vocabulary", "embed"),
        weights: WeightType = "float",
    ):
        shape, is_int8 = (vocabulary, width), weights == "int8"
        self.table = int8(shape, axes) if is_int8 else param(rngs, shape, axes, fan_in=width)
        self.table_scale = constant(shape[:1], axes[:1], 1.0) if is_int8 else None

    def __call__(self, ids: Array) -> Array:
        rows = jnp.take(self.table[...], ids, axis=0)
        if self.table_scale is None:
            return rows
        scale = jnp.take(self.table_scale[...], ids)[..., None]
        return rows.astype(scale.dtype) * scale

    def to_float(self, donate: bool = False) -> None:
        """Multiply an int8 table by its scales, once for all calls. donate: see `freed`."""
        if self.table_scale is None:
            return
        table, scale = self.table[...], self.table_scale[...]
        product = table.astype(scale.dtype) * scale[..., None]
        self.table = self.table.replace(freed([table, scale], product, donate))
        self.table_scale = None


def inside(lengths: Array, size: int) -> Array:
    """Mask of padded rows: lengths [B] -> bool [B, size], True at indices below a row's length."""
    return jnp.arange(size)[None] < lengths[:, None]


def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, causal: bool = False
) -> Array:
    """Softmax attention, q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    N is a multiple of K; scores are scaled by H ** -0.5. mask: bool, broadcast to [B, N, T, S],
    True = attend. causal: query t attends to keys 0 to t.
    """
    kernel = "cudnn" if mask is None and has_fused_attention(q) else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=kernel)


def has_fused_attention(q: Array) -> bool:
    """True if cuDNN's attention kernel takes queries like q: on NVIDIA GPUs from Ampere on.

    Without it XLA writes out the scores [B, N, T, S] in float32.
    """
    capability = getattr(jax.devices()[0], "compute_capability", "")
    supported = capability[:1].isdigit() and float(capability) >= 8
    return supported and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] in range(8, 129, 8)


Result = TypeVar("Result")


def freed(old: Sequence[Array], new: Result, donate: bool) -> Result:
    """`new`, which was computed from the arrays `old`.

    donate: delete these, so that a model that is rearranged array by array is never in memory
    twice. Nothing else may use them then.
    """
    if donate:
        for array in old:
            array.delete()
    return new

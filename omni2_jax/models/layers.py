"""The few layers every part is made of. B batch, T query time, S key time, D width, N heads, K key/value heads, H head size.

A module computes in the dtype of its input and casts its weights to it (a no-op when they agree), so the caller picks
the precision. Each parameter carries `axes`, its logical axis names; sharding rules map those to the mesh.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

LORA_SCALE = 2.0  # alpha / rank
REMAT = {  # what a layer keeps from the forward pass for the backward pass; the rest is computed again
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], fan_in: int | None = None
) -> nnx.Param:
    """A float32 parameter: normal with deviation 1/sqrt(fan_in), or zeros without a fan-in."""
    shape = tuple(shape)
    if fan_in is None:
        return nnx.Param(jnp.zeros(shape), axes=tuple(axes))
    return nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(fan_in), axes=tuple(axes))


class Linear(nnx.Module):
    """y[..., out] = x[..., in] kernel[in, out] + bias[out]; `in` and `out` may span several axes (heads).

    rank: of a low-rank update beside the kernel, LORA_SCALE * low[in, rank] high[rank, out], zero at first (LoRA, arXiv 2106.09685).
    """

    def __init__(
        self, rngs: nnx.Rngs, shape, axes, in_dims: int = 1, bias: bool = True, rank: int = 0
    ):
        self.in_dims = in_dims
        fan_in = math.prod(shape[:in_dims])
        self.kernel = param(rngs, shape, axes, fan_in)
        self.bias = param(rngs, shape[in_dims:], axes[in_dims:]) if bias else None
        self.low = (
            param(rngs, (*shape[:in_dims], rank), (*axes[:in_dims], None), fan_in) if rank else None
        )
        self.high = param(rngs, (rank, *shape[in_dims:]), (None, *axes[in_dims:])) if rank else None

    def __call__(self, x: Array) -> Array:
        y = contract(x, self.kernel[...], self.in_dims)
        if self.low is not None:
            y = y + LORA_SCALE * contract(
                contract(x, self.low[...], self.in_dims), self.high[...], 1
            )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def contract(x: Array, kernel: Array, dims: int) -> Array:
    """The last `dims` axes of x against the first ones of the kernel, in x's dtype."""
    axes = (tuple(range(x.ndim - dims, x.ndim)), tuple(range(dims)))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))


class Conv1d(nnx.Module):
    """Convolution over time, [B, T, C_in] -> [B, T', C_out], kernel [K, C_in / groups, C_out]; padding (left, right) in samples."""

    def __init__(
        self,
        rngs,
        shape,
        *,
        stride=1,
        dilation=1,
        padding=(0, 0),
        groups=1,
        bias=True,
        axes=(None, None, None),
    ):
        self.stride, self.dilation, self.padding, self.groups = (
            stride,
            dilation,
            tuple(padding),
            groups,
        )
        self.kernel = param(rngs, shape, axes, fan_in=shape[0] * shape[1])
        self.bias = param(rngs, shape[2:], axes[2:]) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride,),
            padding=(self.padding,),
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float = 1e-5, axis: str | None = None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(size), axes=(axis,))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (
            y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        ).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float = 1e-6, axis: str | None = None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
        return y * self.scale[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [V, D]."""

    def __init__(self, rngs: nnx.Rngs, vocabulary: int, width: int, axes=("vocabulary", "embed")):
        self.table = param(rngs, (vocabulary, width), axes, fan_in=width)

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.table[...], ids, axis=0)


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Array:
    """Softmax attention, q [B, T, N, H], k and v [B, S, K, H] (N a multiple of K) -> [B, T, N, H].

    `mask` (bool, True = attend) and `bias` broadcast to [B, N, T, S]; causal: row t sees rows 0 to t. The default scale is H ** -0.5.
    """
    fused = mask is None and bias is None and has_fused_attention(q)
    kernel = "cudnn" if fused else None
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, is_causal=causal, implementation=kernel
    )


def has_fused_attention(q: Array) -> bool:
    """Whether cuDNN's kernel takes it: NVIDIA GPUs from Ampere on. XLA writes out the scores [B, N, T, S], in float32, instead."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    able = capability[:1].isdigit() and float(capability) >= 8
    return able and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] in range(8, 129, 8)


def stack(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` copies of a module with their parameters stacked on a leading axis, to be run by `scan`."""
    return nnx.vmap(build, in_axes=0, out_axes=0)(rngs.split(count))


def unstack(layers: nnx.Module) -> nnx.List:
    """Stacked layers as a list, each with arrays of its own. `scan` then unrolls them: twice as fast on a CPU, where a scan copies
    every layer's weights before it uses them, but slow to compile."""
    graph, params = nnx.split(layers)
    count = jax.tree.leaves(params)[0].shape[0]
    return nnx.List(
        [nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], params)) for i in range(count)]  # noqa: B023
    )


def scan(layers: nnx.Module, body: Callable, carry, xs=None, remat: str = "none"):
    """Run layers in order: `body(layer, carry, x) -> (carry, y)`; stacked ones once compiled for all of them, listed ones unrolled.

    remat: one of REMAT, for stacked layers.
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            carry, y = body(layer, carry, jax.tree.map(lambda leaf: leaf[i], xs))  # noqa: B023
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)
    graph, params = nnx.split(layers)
    one = lambda carry, x: body(nnx.merge(graph, x[0]), carry, x[1])  # noqa: E731
    if (
        remat != "none"
    ):  # a scan's body is not merged with its neighbours, so nothing has to be kept apart
        one = jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(one, carry, (params, xs))

"""What the flow's estimator keeps of finished frames.

B rows, K size of a convolution, C channels.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.models.flow.cache import ConvCache, RingKVCache

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageConvs:
    """The caches of a stage's two convolutions."""

    conv1: ConvCache
    conv2: ConvCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageCache:
    """What a stage keeps of finished frames."""

    convs: StageConvs
    kv: RingKVCache  # the whole estimator's, at this stage's first layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EstimatorConvs:
    """The caches of all convolutions of the estimator, of one Euler step or (axis 0) of all."""

    down: StageConvs
    down_conv: ConvCache
    middle: StageConvs  # with an axis of stages
    up: StageConvs
    up_conv: ConvCache
    final: ConvCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EstimatorCache:
    """What the estimator keeps of finished frames.

    Each Euler step is a network pass of its own and has its own share of both caches. Rows 0 to
    B - 1 are the guided branch, rows B to 2B - 1 the free one.
    """

    convs: EstimatorConvs | ConvCache  # one array where blocks are listed (`packed`)
    kv: RingKVCache  # a pass over all layers for each step


def packed(convs: EstimatorConvs) -> ConvCache:
    """The caches of all convolutions as one array [B, K - 1, all channels].

    A GPU then writes them with one kernel.
    """

    def flat(leaf: Array) -> Array:
        if leaf.ndim == 3:
            return leaf
        moved = jnp.moveaxis(leaf, 0, 2)  # of stages
        return moved.reshape(*moved.shape[:2], -1)

    return ConvCache(jnp.concatenate([flat(leaf) for leaf in jax.tree.leaves(convs)], -1))


def unpacked(cache: ConvCache, like: EstimatorConvs) -> EstimatorConvs:
    """The inverse of `packed`. like: a tree of the shapes."""
    leaves, tree = jax.tree.flatten(like)
    rows = cache.inputs.shape[:2]
    ends = np.cumsum([leaf.size // math.prod(rows) for leaf in leaves])[:-1]
    parts = jnp.split(cache.inputs, ends, -1)

    def whole(part: Array, shape: tuple[int, ...]) -> Array:
        if len(shape) == 3:
            return part
        return jnp.moveaxis(part.reshape(*rows, shape[0], shape[-1]), 2, 0)

    shaped = [whole(part, leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)

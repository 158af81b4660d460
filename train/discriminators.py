"""Discriminators of samples, and the losses between them and a vocoder.

Multi-period (HiFi-GAN, arXiv 2010.05646) and multi-resolution (UnivNet, arXiv 2106.07889), small:
convolutions are products of adjacent blocks with a matrix, since XLA's gradients of strided
convolutions are slow on a CPU.
B rows, N samples, P phases of a period, T time, F bins, C channels.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import Array, Linear
from omni2_jax.train.spectral import magnitudes, row_mean

Maps = list[list[Array]]  # the feature maps of each discriminator, its scores last

SLOPE = 0.1  # of the leaky ReLUs
STRIDES = {"period": 3, "resolution": 4}
LAYERS = 3  # strided ones, each of which has twice the channels of the one before
FLOOR = 1e-3  # added to magnitudes before the logarithm
TAU = 0.04  # the largest relativistic loss


class BlockConv(nnx.Module):
    """A convolution of stride S over the third axis, [B, A, T, C] -> [B, A, ceil(T / S), C'].

    spans: its kernel is so many strides long; beside: and covers so many steps of the second axis.
    """

    def __init__(
        self, rngs: nnx.Rngs, c_in: int, c_out: int, stride: int, spans: int, beside: int = 1
    ):
        self.stride, self.spans, self.beside = stride, spans, beside
        self.linear = Linear(rngs, (beside * spans * stride * c_in, c_out), (None, None))

    def __call__(self, x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.stride), (0, 0)))
        x = x.reshape(*x.shape[:2], x.shape[2] // self.stride, -1)
        return self.linear(adjacent(adjacent(x, self.spans, 2), self.beside, 1))


def adjacent(x: Array, count: int, axis: int) -> Array:
    """Each step of an axis with `count` - 1 steps around it, in the last axis; zeros outside."""
    before, size = (count - 1) // 2, x.shape[axis]
    edges = [(0, 0)] * x.ndim
    edges[axis] = (before, count - 1 - before)
    padded = jnp.pad(x, edges)
    parts = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(count)]
    return jnp.concatenate(parts, -1)


class Discriminator(nnx.Module):
    """Strided convolutions and a score for every place that is left. beside: see `BlockConv`."""

    def __init__(self, rngs: nnx.Rngs, width: int, stride: int, beside: int):
        sizes = [1, *(width * 2**i for i in range(LAYERS))]
        self.convs = nnx.List(
            [BlockConv(rngs, *pair, stride, 2, beside) for pair in itertools.pairwise(sizes)]
        )
        self.score = BlockConv(rngs, sizes[-1], 1, 1, 3, beside)

    def __call__(self, x: Array) -> list[Array]:
        """[B, A, T, 1] -> what every layer makes of it, the scores last."""
        maps = []
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return [*maps, self.score(x)]


class Discriminators(nnx.Module):
    """One discriminator for each period and each resolution."""

    def __init__(
        self, rngs: nnx.Rngs, width: int, periods: Sequence[int], resolutions: Sequence[int]
    ):
        self.sizes, self.lengths = tuple(periods), tuple(resolutions)
        self.periods = nnx.List([Discriminator(rngs, width, STRIDES["period"], 1) for _ in periods])
        self.resolutions = nnx.List(
            [Discriminator(rngs, width, STRIDES["resolution"], 3) for _ in resolutions]
        )

    def __call__(self, x: Array) -> Maps:
        """Samples [B, N] -> the feature maps of each discriminator, its scores last."""
        maps = []
        for size, judge in zip(self.sizes, self.periods, strict=True):
            length = x.shape[1] // size * size
            phases = x[:, :length].reshape(len(x), -1, size)  # [B, T, P]
            maps.append(judge(phases.swapaxes(1, 2)[..., None]))
        for size, judge in zip(self.lengths, self.resolutions, strict=True):
            spectrum = magnitudes(x, size)[..., 1:]  # without the mean; F is a power of two
            maps.append(judge(jnp.log(spectrum + FLOOR)[..., None]))
        return maps


# ---- losses, of what `Discriminators` returns; rows [B]: bool, those that count ----


def discriminator_loss(recorded: Maps, generated: Maps, rows: Array) -> Array:
    """Least squares: the scores of recordings towards 1, those of generated samples towards 0."""
    return sum(
        (
            row_mean(jnp.square(1 - real[-1]), rows) + row_mean(jnp.square(false[-1]), rows)
            for real, false in zip(recorded, generated, strict=True)
        ),
        jnp.zeros(()),
    )


def adversarial_loss(generated: Maps, rows: Array) -> Array:
    """Least squares: the scores of generated samples towards 1."""
    return sum((row_mean(jnp.square(1 - maps[-1]), rows) for maps in generated), jnp.zeros(()))


def feature_loss(recorded: Maps, generated: Maps, rows: Array) -> Array:
    """The mean difference of every feature map, added up (HiFi-GAN, equation 6)."""
    return sum(
        (
            row_mean(jnp.abs(real - false), rows)
            for judge in zip(recorded, generated, strict=True)
            for real, false in zip(*judge, strict=True)
        ),
        jnp.zeros(()),
    )


def relativistic_loss(better: Maps, worse: Maps, rows: Array) -> Array:
    """The truncated pointwise relativistic loss of `better` against `worse` (HiFTNet, section 2.4).

    The scores of one should exceed those of the other by more than the median difference; TAU at
    most. For the discriminators recordings are better, for the vocoder generated samples are.
    """
    total = jnp.zeros(())
    for one, other in zip(better, worse, strict=True):
        difference = one[-1] - other[-1]
        excess = difference - jnp.median(difference)
        counts = (excess < 0) & rows.reshape(-1, *(1,) * (excess.ndim - 1))
        squares = jnp.where(counts, jnp.square(excess), 0).sum() / jnp.maximum(counts.sum(), 1)
        total += TAU - jax.nn.relu(TAU - squares)
    return total

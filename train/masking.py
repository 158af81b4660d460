"""SpecAugment: parts of a mel spectrogram are hidden in training, so that no part of it is learned
by heart (Park et al. 2019).

A question is a few words long, and a hidden word changes its answer. So stretches of time are much
shorter here than in the paper.
"""

import jax
import jax.numpy as jnp

BAND = 1 / 8  # the widest band, of the mels; the paper has 27 of 80
STRETCH = 12  # the longest stretch, in frames of 10 ms; the paper has 100


def masked(mel: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Log-mels [B, T, mels] with `count` bands and `count` stretches of time hidden in each.

    What is hidden is the mean of its spectrogram. The sizes of bands and stretches are drawn
    uniformly from zero to the largest, their places from all that they fit in.
    """
    rows, frames, mels = mel.shape
    in_time, in_frequency = jax.random.split(key)
    hidden = draw(in_time, (rows, count), frames, STRETCH)[:, :, None]
    hidden |= draw(in_frequency, (rows, count), mels, int(BAND * mels))[:, None, :]
    return jnp.where(hidden, jnp.mean(mel, axis=(1, 2), keepdims=True), mel)


def draw(key: jax.Array, shape: tuple[int, int], length: int, longest: int) -> jax.Array:
    """Which places of `length` are in one of the ranges of each row, [rows, length] bool.

    shape: (rows, ranges of a row).
    """
    first, second = jax.random.split(key)
    size = jax.random.randint(first, shape, 0, min(longest, length) + 1)
    start = jax.random.randint(second, shape, 0, length + 1 - size)
    place = jnp.arange(length)
    inside = (place >= start[..., None]) & (place < (start + size)[..., None])
    return inside.any(axis=1)

"""How the phases of a voice's harmonics differ from a recording's.

The losses of spectral.py compare magnitudes. A vocoder that learns by them alone gives the
harmonics phases of its own, and sounds less natural (examples/joe/README.md has figures of DNSMOS).
A loss cannot compare samples one by one instead, because a mel does not say where in a period it
begins. So this loss compares the harmonics of each frame after the delay that fits best.

B rows, T mel frames, H harmonics (the fundamental first).
"""

import jax
import jax.numpy as jnp

from omni2_jax.audio import features
from omni2_jax.audio.recordings import OUTPUT_RATE

Array = jax.Array

COUNT, TOP = 12, 1500.0  # harmonics that are compared, and the highest frequency of one in Hz
DELAYS = 96  # of a period, which are tried
SILENT = 1e-3  # the amplitude below which a harmonic has no phase; in speech it is about 10


def loss(
    generated: Array, recorded: Array, generated_f0: Array, recorded_f0: Array, rows: Array
) -> Array:
    """One minus the mean cosine of the differences in phase, 0 (none) to 1 (unrelated).

    Signals [B, 480 T]; their F0 [B, T] in Hz, 0 = unvoiced; rows [B]: bool, those that count. A
    harmonic weighs as much as the root of its amplitude in the recording. The first and the last
    frame are left out.
    """
    own, other = harmonics(generated, generated_f0), harmonics(recorded, recorded_f0)
    orders = jnp.arange(1, COUNT + 1)
    voiced = (generated_f0 > 0) & (recorded_f0 > 0) & rows[:, None]
    counted = voiced[:, 1:-1, None] & (orders * recorded_f0[:, 1:-1, None] < TOP)
    weights = jnp.where(counted, jnp.sqrt(jnp.abs(other)), 0)
    # A delay of d periods turns harmonic h by h d.
    turns = jnp.exp(-2j * jnp.pi * orders[:, None] * jnp.arange(DELAYS) / DELAYS)
    match = ((weights * phasors(other) * phasors(own).conj()) @ turns).real.max(-1)
    return (weights.sum() - match.sum()) / jnp.maximum(weights.sum(), 1e-6)


def harmonics(samples: Array, f0: Array) -> Array:
    """Complex amplitudes of the harmonics of f0 [B, T] in samples [B, 480 T], [B, T - 2, H].

    Those at the centre of each frame but the first and the last, over 60 ms around it.
    """
    blocks = samples.reshape(*f0.shape, -1)
    frames = jnp.concatenate([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], -1)
    size = frames.shape[-1]
    seconds = (jnp.arange(size) - size / 2) / OUTPUT_RATE
    fundamental = jnp.exp(-2j * jnp.pi * f0[:, 1:-1, None] * seconds)
    product, amplitudes = frames * features.hann(size), []
    for _ in range(COUNT):
        product *= fundamental
        amplitudes.append(product.sum(-1))
    return jnp.stack(amplitudes, -1)


def phasors(amplitudes: Array) -> Array:
    """Complex numbers of magnitude 1 with the same phases; of less where it is silent."""
    power = jnp.square(amplitudes.real) + jnp.square(amplitudes.imag)
    return amplitudes / jnp.sqrt(power + SILENT**2)

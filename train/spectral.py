"""Spectra of generated samples, and their losses against recordings.

Here frames begin at the first sample and end before the last, without padding: what is compared is
cut out of longer recordings. B rows, N samples, T frames, F bins, M mel bins.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from omni2_jax.audio import features
from omni2_jax.audio.recordings import OUTPUT_RATE

Array = jax.Array

RESOLUTIONS = (256, 512, 1024, 2048)  # samples of the Fourier transforms of `stft_loss`
OVERLAP = 4  # frames that a sample belongs to
MELS, TOP = 80, 12000.0  # bins of the loss's mel, and its highest frequency in Hz
QUIET = 1e-5  # magnitudes below it count as it


def magnitudes(x: Array, size: int) -> Array:
    """Samples [B, N] -> magnitudes of the Fourier transform of `size` samples, [B, T, F]."""
    hop = size // OVERLAP
    # Slices of blocks and not an index for each sample: their gradient is no scatter.
    blocks = x[:, : x.shape[1] // hop * hop].reshape(len(x), -1, hop)
    count = blocks.shape[1] - OVERLAP + 1
    frames = jnp.concatenate([blocks[:, i : i + count] for i in range(OVERLAP)], -1)
    return jnp.sqrt(features.power(frames, features.hann(size)) + 1e-9)


def row_mean(x: Array, rows: Array) -> Array:
    """The mean of x [B, ...] over the rows that count, `rows` [B] bool."""
    means = x.reshape(len(x), -1).mean(1)
    return jnp.where(rows, means, 0).sum() / jnp.maximum(rows.sum(), 1)


def stft_loss(
    generated: Array, recorded: Array, rows: Array, sizes: Sequence[int] = RESOLUTIONS
) -> Array:
    """How far two signals [B, N] differ in magnitude: spectral convergence and log-magnitude L1.

    The mean over resolutions (Parallel WaveGAN, arXiv 1910.11480, section 2.2). rows [B]: bool,
    those that count.
    """
    total = jnp.zeros(())
    for size in sizes:
        x, y = magnitudes(generated, size), magnitudes(recorded, size)
        convergence = row_mean(jnp.square(x - y), rows) / (row_mean(jnp.square(y), rows) + 1e-6)
        total += jnp.sqrt(convergence + 1e-9)
        total += row_mean(jnp.abs(log(x) - log(y)), rows)
    return total / len(sizes)


def mel_loss(generated: Array, recorded: Array, rows: Array) -> Array:
    """The mean difference of the log-mels of two signals [B, N], in nepers.

    These mels reach up to half the rate; those that the vocoder is given end at 8 kHz. rows [B]:
    bool, those that count.
    """
    bank = features.slaney_bank(OUTPUT_RATE, features.SPEECH_FFT, MELS, TOP)
    x, y = (
        log(features.project(magnitudes(samples, features.SPEECH_FFT), bank))
        for samples in (generated, recorded)
    )
    return row_mean(jnp.abs(x - y), rows)


def log(magnitude: Array) -> Array:
    """The natural logarithm, of QUIET at least."""
    return jnp.log(jnp.maximum(magnitude, QUIET))

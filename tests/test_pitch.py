"""The fundamental frequency of recordings, against signals whose frequency is known."""

import numpy as np
import pytest

from omni2_jax.audio import pitch

RATE, HOP = 24000, 480


def glide(low: float, high: float, seconds: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Pulses that glide from `low` to `high` Hz: samples, and the frequency in mid-frame."""
    time = np.arange(round(seconds * RATE)) / RATE
    frequency = low * (high / low) ** (time / seconds)
    cycles = np.cumsum(frequency / RATE)
    harmonics = np.arange(1, 12)[:, None]
    samples = (np.cos(2 * np.pi * harmonics * cycles) / harmonics).sum(0)
    return samples / 10, frequency[HOP // 2 :: HOP]


@pytest.mark.parametrize("low, high", [(80, 160), (300, 120), (200, 210)])
def test_a_glide(low, high):
    samples, expected = glide(low, high)
    found = pitch.f0(samples)
    assert found.shape == expected.shape and (found > 0).mean() > 0.95
    voiced = found > 0
    assert np.abs(found / expected - 1)[voiced].max() < 0.05
    assert np.abs(found - expected)[voiced].mean() < 1


def test_voiced_and_unvoiced():
    """A tone, noise and silence, 0.5 s each: only the tone is voiced, but for frames at its end."""
    random = np.random.default_rng(0)
    tone, _ = glide(120, 130, 0.5)
    samples = np.concatenate([tone, 0.1 * random.standard_normal(len(tone)), np.zeros(len(tone))])
    voiced = pitch.f0(samples) > 0
    assert voiced[1:23].all() and not voiced[27:].any()


@pytest.mark.parametrize("size", [0, 479, 480, 1000])
def test_hardly_any_samples(size):
    assert pitch.f0(np.zeros(size)).tolist() == [0.0] * (size // HOP)

"""Another sample rate, as samples arrive."""

import numpy as np
import pytest
import soxr

from omni2_jax.audio.resampler import Resampler

RATES = pytest.mark.parametrize(("source", "target"), [(24, 16), (8, 16), (24, 8)])


@RATES
def test_cuts_change_nothing(source, target):
    samples = np.random.default_rng(0).standard_normal(source * 100 + 1).astype(np.float32)
    whole = Resampler(source * 1000, target * 1000)(samples, last=True)
    assert len(whole) == -(-len(samples) * target // source)
    for size in (1, 7, source * 16):
        resampler = Resampler(source * 1000, target * 1000)
        parts = [resampler(samples[start:][:size]) for start in range(0, len(samples), size)]
        parts.append(resampler(samples[:0], last=True))
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@RATES
def test_it_keeps_back_at_most_9_ms(source, target):
    resampler, heard = Resampler(source * 1000, target * 1000), 0
    for milliseconds in range(1, 200):
        heard += len(resampler(np.zeros(source, np.float32)))
        assert milliseconds * target - heard <= 9 * target


@RATES
def test_like_soxr(source, target):
    """No delay, no loss in 90 % of the lower rate's band, and nothing from beyond the band."""
    time = np.arange(source * 1000) / (source * 1000)
    band = min(source, target) * 500
    inner = slice(target * 50, -target * 50)
    for frequency in (0.01 * band, 0.5 * band, 0.9 * band):
        samples = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        expected = soxr.resample(samples, source, target, quality="HQ")
        result = Resampler(source * 1000, target * 1000)(samples, last=True)
        np.testing.assert_allclose(result[inner], expected[inner], atol=1e-4)
    beyond = np.linspace(1.01 * band, 0.99 * source * 500, 5) if source > target else []
    for frequency in beyond:
        samples = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        result = Resampler(source * 1000, target * 1000)(samples, last=True)
        assert np.abs(result[inner]).max() < 10 ** (-96 / 20)

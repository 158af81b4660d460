"""Mixtures of the spectra of recordings and copies: by hand, and the command."""

import json

import numpy as np
import pytest

from benchmarks import spectra
from omni2_jax.evaluate.copies import Copy
from tests.support.evaluations import write_items


def tone(hertz: float, amplitude: float = 0.5) -> np.ndarray:
    """One second."""
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(24000) / 24000)).astype(np.float32)


def level(samples: np.ndarray, hertz: float) -> float:
    """The amplitude of a tone in one second of sound."""
    return 2 * abs(np.fft.rfft(samples)[round(hertz)]) / len(samples)


def test_mixtures_of_a_sound_with_itself_are_the_sound():
    sound = np.random.default_rng(0).normal(size=9600).astype(np.float32)
    found = spectra.mixtures(sound, sound, [700])
    assert len(found) == 6
    for samples in found.values():
        np.testing.assert_allclose(samples, sound, atol=1e-5)


def test_magnitudes_and_phases_come_from_the_sounds_that_are_named():
    """A copy of half the magnitudes, with all phases turned by 180 degrees."""
    sound = np.random.default_rng(0).normal(size=9600).astype(np.float32)
    found = spectra.mixtures(sound, -0.5 * sound, [])
    own_magnitudes = found["recording's magnitudes, copy's phases"]
    own_phases = found["copy's magnitudes, recording's phases"]
    np.testing.assert_allclose(own_magnitudes, -sound, atol=1e-5)
    np.testing.assert_allclose(own_phases, 0.5 * sound, atol=1e-5)


def test_bands_come_from_the_sounds_that_are_named():
    recording = tone(300) + tone(3000)
    copy = tone(400) + tone(4000)
    found = spectra.mixtures(recording, copy, [1000])
    heard = {"recording below 1000 Hz, copy above": (300, 4000)}
    heard["copy below 1000 Hz, recording above"] = (400, 3000)
    for name, tones in heard.items():
        for hertz in (300, 400, 3000, 4000):
            expected = 0.5 if hertz in tones else 0
            assert level(found[name], hertz) == pytest.approx(expected, abs=0.01), (name, hertz)


class HalfMaker:
    """Copies of half the amplitude."""

    def __init__(self, directory, vocoder_only):
        assert vocoder_only

    def __call__(self, samples: np.ndarray) -> dict[str, Copy]:
        return {"vocoder": Copy(np.zeros((1, 80)), samples / 2, 0.1)}


def test_the_command(checkpoint_dir, tmp_path, monkeypatch, capsys):
    """A rating that is the square of the amplitude falls to a quarter with the copy's."""
    monkeypatch.setattr(spectra, "CopyMaker", HalfMaker)
    monkeypatch.setattr(spectra, "open_dnsmos", lambda: lambda x: float(np.square(x).sum()))
    out = tmp_path / "figures.json"
    spectra.main(checkpoint_dir, write_items(tmp_path), limit=3, below=None, out=out)
    found = json.loads(out.read_text())
    assert {len(values) for values in found.values()} == {3}
    for mixture, share in [
        ("recording", 1),
        ("copy", 1 / 4),
        ("recording's magnitudes, copy's phases", 1),
        ("copy's magnitudes, recording's phases", 1 / 4),
    ]:
        expected = share * np.array(found["recording"])
        np.testing.assert_allclose(found[mixture], expected, rtol=1e-4, err_msg=mixture)
    assert "copy below 700 Hz, recording above" in capsys.readouterr().out

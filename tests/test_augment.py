"""Changes of spoken questions, and the checks of clips."""

import numpy as np
import pytest

from omni2_jax.jobs import Refused
from omni2_jax.synthesize.augment import Augment, changed, coloured_noise, without_speech
from omni2_jax.synthesize.clip_checks import Checks, speech_seconds, spoken_characters

RATE = 16000


def tone(seconds: float, hertz: float = 440, level: float = 0.3) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def change(samples: np.ndarray, seed: int = 0, **changes: float) -> np.ndarray:
    return changed(samples, RATE, changes, np.random.default_rng(seed))


def peak_frequency(samples: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples)))) * RATE / len(samples)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed(factor):
    faster = change(tone(1), speed=factor)
    assert abs(len(faster) - RATE / factor) <= 2
    assert abs(peak_frequency(faster) - 440 * factor) < 2


def test_gain():
    np.testing.assert_allclose(change(tone(1), gain=-20), tone(1) / 10, atol=1e-6)
    assert np.max(np.abs(change(tone(1), gain=20))) == pytest.approx(0.99)  # as a whole


@pytest.mark.parametrize("ratio", [0, 20])
def test_noise_has_the_stated_ratio(ratio):
    clean = tone(2, level=0.1)
    noise = change(clean, noise=ratio) - clean
    measured = 10 * np.log10(np.mean(clean**2) / np.mean(noise**2))
    assert measured == pytest.approx(ratio, abs=0.1)


def test_reverberation():
    """A click becomes a direct sound and a tail that decays by 60 dB in the stated time."""
    click = np.zeros(RATE, np.float32)
    click[0] = 0.5
    room = change(click, reverberation=0.4)
    assert room[0] == pytest.approx(0.5, abs=1e-5) and len(room) == RATE + round(0.4 * RATE) - 1
    levels = [np.sqrt(np.mean(room[start : start + 320] ** 2)) for start in (320, 320 + 3200)]
    assert 20 * np.log10(levels[0] / levels[1]) == pytest.approx(30, abs=3)  # in half the time
    assert np.sum(room[1:] ** 2) == pytest.approx(0.25, rel=1e-3)


def test_the_seed_decides():
    augment = Augment(share=0.5, speed=(0.9, 1.1), gain=(-10, 0), noise=(5, 30))
    drawn = [augment.draw(np.random.default_rng(seed)) for seed in range(400)]
    assert drawn == [augment.draw(np.random.default_rng(seed)) for seed in range(400)]
    for name, (least, most) in {"speed": (0.9, 1.1), "gain": (-10, 0), "noise": (5, 30)}.items():
        values = [one[name] for one in drawn if name in one]
        assert abs(len(values) - 200) < 50 and least <= min(values) < max(values) <= most
    assert "reverberation" not in {name for one in drawn for name in one}
    noisy = {"noise": 10.0, "reverberation": 0.2}
    np.testing.assert_array_equal(change(tone(0.1), 3, **noisy), change(tone(0.1), 3, **noisy))
    assert np.any(change(tone(0.1), 3, **noisy) != change(tone(0.1), 4, **noisy))


def test_noise_has_many_colours():
    """The spectrum falls by 0 to 6 dB an octave."""
    falls = []
    for seed in range(40):
        spectrum = np.abs(np.fft.rfft(coloured_noise(2**14, np.random.default_rng(seed)))) ** 2
        low, high = np.mean(spectrum[256:512]), np.mean(spectrum[4096:8192])
        falls.append(10 * np.log10(low / high) / 4)
    assert -0.5 < min(falls) < 1 and 5 < max(falls) < 6.5


def test_recordings_without_speech():
    made = [without_speech(RATE, np.random.default_rng(seed)) for seed in range(40)]
    assert all(0.6 <= len(one) / RATE <= 2 for one in made)
    levels = np.array([np.sqrt(np.mean(one**2)) for one in made])
    assert 3 < np.count_nonzero(levels == 0) < 20 and levels.max() < 0.033


def test_seconds_of_speech():
    silence = np.zeros(RATE // 2, np.float32)
    clip = np.concatenate([silence, tone(0.5), silence, tone(0.25), silence])
    assert speech_seconds(clip, RATE) == pytest.approx(1.25, abs=0.03)
    assert speech_seconds(silence, RATE) == speech_seconds(tone(1, level=1e-4), RATE) == 0
    assert speech_seconds(silence[:10], RATE) == 0


CLIPS = {
    "right": (tone(1.0), "One and two.", None),
    "a digit": (tone(1.5), "72, 19?", None),
    "nothing": (np.zeros(RATE, np.float32), "One and two.", "silent"),
    "no samples": (np.zeros(0, np.float32), "One and two.", "silent"),
    "short": (tone(0.2), "One and two.", "too short"),
    "long": (tone(9.0), "One and two.", "too long"),
    "clipped": (np.clip(tone(1.0, level=3), -1, 1), "One and two.", "clipped"),
    "at full scale for a moment": (tone(1.0, level=1.0), "One and two.", None),
}


@pytest.mark.parametrize("samples, text, reason", CLIPS.values(), ids=CLIPS)
def test_checks(samples, text, reason):
    checks = Checks(clipped=0.1)
    if reason is None:
        return checks.check(samples, RATE, text)
    with pytest.raises(Refused) as refused:
        checks.check(samples, RATE, text)
    assert refused.value.reason == reason


def test_characters():
    assert spoken_characters("It's 72, isn't it?") == 9 + 2 * 5
    assert spoken_characters("Tea is spelled T, E, A.") == 12 + 3 * 4

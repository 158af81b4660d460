"""Changes of spoken questions, as by rooms, microphones and distances. N samples in [-1, 1].

Each kind of change comes to a share of the questions, with a strength drawn evenly from its range.
Everything drawn comes from the random generator given, so it follows from the seed.
"""

import numpy as np
from numpy.random import Generator
from pydantic import BaseModel, ConfigDict, model_validator
from scipy import signal

from omni2_jax.audio import recordings

Range = tuple[float, float]
LIMITS = {
    "speed": (0.5, 2.0),
    "gain": (-60.0, 20.0),
    "noise": (-10.0, 100.0),
    "reverberation": (0.02, 3.0),
}
SPEED_STEPS = 1000  # rates are rounded to thousandths: the resampler takes a ratio
EARLY_SECONDS = 0.003  # of an impulse response, before the first reflection
LOUDEST = 0.99  # of a sample; louder clips are scaled down as a whole


class Augment(BaseModel):
    """What happens to questions; None leaves one kind out.

    share: of the questions, for each kind of change. speed: factors, which also change the pitch.
    gain: dB. noise: the signal-to-noise ratio in dB. reverberation: seconds in which the sound of
    the room decays by 60 dB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = 0.5
    speed: Range | None = None
    gain: Range | None = None
    noise: Range | None = None
    reverberation: Range | None = None

    @model_validator(mode="after")
    def check(self) -> "Augment":
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share:g}, expected 0 to 1")
        for name, (least, most) in LIMITS.items():
            bounds = getattr(self, name)
            if bounds is not None and not least <= bounds[0] <= bounds[1] <= most:
                raise ValueError(
                    f"{name} is {list(bounds)}, expected a range within {least:g} to {most:g}"
                )
        return self

    def draw(self, rng: Generator) -> dict[str, float]:
        """The changes of one clip: the strength of each kind that it gets."""
        drawn = {}
        for name in LIMITS:
            bounds, chance, place = getattr(self, name), rng.random(), rng.random()
            if bounds is not None and chance < self.share:
                drawn[name] = round(bounds[0] + place * (bounds[1] - bounds[0]), 3)
        return drawn


def changed(
    samples: np.ndarray, rate: int, changes: dict[str, float], rng: Generator
) -> np.ndarray:
    """Samples [N] at `rate` Hz with the changes of `Augment.draw`: float32 [N'].

    The room comes before the noise, as a microphone records them.
    """
    if "speed" in changes:
        steps = round(changes["speed"] * SPEED_STEPS)
        samples = recordings.resample(samples, steps, SPEED_STEPS)
    if "reverberation" in changes:
        samples = reverberated(samples, rate, changes["reverberation"], rng)
    if "noise" in changes:
        samples = samples + noise_for(samples, changes["noise"], rng)
    samples = samples * 10 ** (changes.get("gain", 0.0) / 20)
    peak = float(np.max(np.abs(samples), initial=0))
    return (samples * (LOUDEST / peak if peak > LOUDEST else 1)).astype(np.float32)


def reverberated(samples: np.ndarray, rate: int, seconds: float, rng: Generator) -> np.ndarray:
    """Samples [N] in a room whose sound decays by 60 dB in `seconds`: [N + tail].

    The room is the usual model of a diffuse one: Gaussian noise that decays exponentially, as loud
    in all as the direct sound.
    """
    times = np.arange(round(seconds * rate)) / rate
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    tail[times < EARLY_SECONDS] = 0
    energy = float(np.sqrt(np.sum(tail**2)))
    if not energy:
        return samples
    response = tail / energy
    response[0] = 1
    return signal.fftconvolve(samples, response)


def noise_for(samples: np.ndarray, ratio: float, rng: Generator) -> np.ndarray:
    """Noise [N] that is `ratio` dB below the mean power of samples [N].

    Its spectrum falls by 0 to 6 dB an octave: between white and brown.
    """
    noise = coloured_noise(len(samples), rng)
    power = float(np.mean(np.square(samples))) / 10 ** (ratio / 10)
    return noise * np.sqrt(power)


def coloured_noise(size: int, rng: Generator) -> np.ndarray:
    """Gaussian noise [size] of mean power 1; its spectrum falls by a random 0 to 6 dB an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.arange(len(spectrum), dtype=float)
    frequencies[:1] = 1
    noise = np.fft.irfft(spectrum * frequencies ** -rng.uniform(0, 1), size)
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


def without_speech(rate: int, rng: Generator) -> np.ndarray:
    """A recording in which nobody speaks: 0.6 to 2 s of silence, or of noise at -60 to -30 dB."""
    size = round(rng.uniform(0.6, 2.0) * rate)
    level = 10 ** (rng.uniform(-60, -30) / 20)
    is_silent = rng.random() < 0.25
    return (coloured_noise(size, rng) * (0.0 if is_silent else level)).astype(np.float32)

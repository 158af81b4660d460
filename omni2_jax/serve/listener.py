"""The user's audio of one connection: what was said since the last turn, and where turns end.

Samples are at 16 kHz and numbered from the beginning of the connection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.serve.audio import Decoder, decode
from omni2_jax.serve.events import EventError, ServerVad
from omni2_jax.serve.turn_detection import (
    Change,
    Detection,
    Detectors,
    TurnDetection,
    TurnDetector,
    give_back,
    take_detectors,
)

MIN_TURN_SECONDS = 0.1  # what a commit needs, as in OpenAI's API
SLICE = INPUT_RATE // 10  # samples that are searched for turns at a time, in about 2 ms
NO_SAMPLES = np.zeros(0, np.float32)


class Listener:
    """Keeps the samples that may belong to the next turn, and finds its beginning and end.

    start_hearing: begins to encode samples [N] and returns the task that computes their features.
    seconds: the longest turn.
    """

    def __init__(
        self, start_hearing: Callable[[np.ndarray], asyncio.Task], seconds: float, audio_format: str
    ):
        self.start_hearing = start_hearing
        self.max_samples = int(seconds * INPUT_RATE)
        self.use_format(audio_format)
        self.detectors: Detectors | None = None  # kept when the settings of turn detection change
        self.detector: TurnDetector | None = None
        self.buffer, self.buffer_start = NO_SAMPLES, 0
        self.turn_start: int | None = None  # the sample that the user began to speak at
        # Features of the turn up to a sample, which are computed because it may have ended there.
        self.early: tuple[int, asyncio.Task] | None = None

    @property
    def end(self) -> int:
        """The number of the next sample."""
        return self.buffer_start + len(self.buffer)

    @property
    def start(self) -> int:
        """The first sample of the next turn, as far as it is known."""
        return self.buffer_start if self.turn_start is None else self.turn_start

    def use_format(self, audio_format: str) -> None:
        """Expect audio in this format from now on."""
        self.format, self.decoder = audio_format, Decoder(audio_format)

    def flush(self) -> np.ndarray:
        """The samples that the decoder holds back; the next audio is not joined to them."""
        samples, odd_byte = self.decoder(b"", last=True), self.decoder.odd_byte
        self.use_format(self.format)
        self.decoder.odd_byte = odd_byte
        return samples

    def detect_turns(self, vad: ServerVad | None) -> None:
        """Look for turns with these settings from now on; None: the client says where they end."""
        self.forget()
        self.detector = None
        if vad:
            self.detectors = self.detectors or take_detectors()
            fields = set(TurnDetection.__dataclass_fields__)
            self.detector = TurnDetector(
                TurnDetection(**vad.model_dump(include=fields)), self.detectors
            )
            self.detector.restart(self.end)

    def forget(self) -> None:
        """Forget where the turn began and what was computed of it; its samples stay."""
        self.turn_start = None
        self.forget_early()

    def forget_early(self) -> None:
        if self.early:
            self.early[1].cancel()
        self.early = None

    def clear(self) -> None:
        """Forget all samples."""
        self.forget()
        self.flush()
        self.drop_before(self.end)
        if self.detector:
            self.detector.restart(self.end)

    def close(self) -> None:
        """Stop looking for turns; the detectors are for the next connection."""
        if self.detectors:
            give_back(self.detectors)
        self.detector = self.detectors = None

    async def append(self, data: bytes) -> AsyncIterator[Detection]:
        """Take audio in, and yield the beginnings and ends of turns in it, in their order.

        The caller takes a turn that has ended with `commit` before it asks for the next change.
        Without turn detection, raises EventError if the turn becomes too long.
        """
        samples = await decode(self.decoder, data)
        if self.detector is None:
            self.buffer = np.concatenate([self.buffer, samples])
            self.check_length()
            return
        detector = self.detector
        while samples.size:
            size = SLICE if self.turn_start is None else min(SLICE, self.last_end - self.end)
            part, samples = samples[:size], samples[size:]
            self.buffer = np.concatenate([self.buffer, part])
            for detection in list(detector.feed(part)):
                if self.note(detection):
                    yield detection
            if self.turn_start is None:
                padding = detector.settings.prefix_padding_ms * INPUT_RATE // 1000
                self.drop_before(self.end - padding - len(detector.rest))
            elif self.end >= self.last_end:
                detector.restart(self.end)
                yield Detection(Change.STOPPED, self.last_end)
            if samples.size:
                await asyncio.sleep(0)  # other clients' turn

    @property
    def last_end(self) -> int:
        """The sample at which the turn that is being spoken has its longest duration."""
        return self.start + self.max_samples

    def note(self, detection: Detection) -> bool:
        """Act on a change -> whether it is the beginning or the end of a turn."""
        if detection.change is Change.STARTED:
            self.turn_start = max(detection.sample, self.buffer_start)
        elif detection.change is Change.PAUSED:
            self.forget_early()
            task = self.start_hearing(self.cut(self.start, detection.sample))
            self.early = (detection.sample, task)
        elif detection.change is Change.RESUMED:
            self.forget_early()
        return detection.change in (Change.STARTED, Change.STOPPED)

    def check_length(self) -> None:
        if len(self.buffer) > self.max_samples:
            self.buffer = self.buffer[: self.max_samples]
            raise EventError(
                f"the input buffer holds {self.max_samples / INPUT_RATE:g} s of audio, the most "
                "that a turn may have; commit or clear it",
                "input_audio_buffer_full",
            )

    def commit(self, stop: int | None = None) -> tuple[np.ndarray, asyncio.Task]:
        """End the turn before sample `stop` (None: now) -> (its samples, the task of its features).

        Without `stop`, raises EventError if the turn is shorter than MIN_TURN_SECONDS.
        """
        if stop is None:
            if self.detector is None:  # otherwise the microphone goes on
                most = self.start - self.buffer_start + self.max_samples
                self.buffer = np.concatenate([self.buffer, self.flush()])[:most]
            stop = self.end
            if stop - self.start < MIN_TURN_SECONDS * INPUT_RATE:
                raise EventError(
                    f"the input buffer holds {(stop - self.start) * 1000 // INPUT_RATE} ms of "
                    f"audio, expected at least {MIN_TURN_SECONDS * 1000:.0f} ms",
                    "input_audio_buffer_commit_empty",
                )
            if self.detector:
                self.detector.restart(stop)
        samples = self.cut(self.start, stop)
        if self.early and self.early[0] == stop:
            task, self.early = self.early[1], None
        else:
            task = self.start_hearing(samples)
        self.forget()
        self.drop_before(stop)
        return samples, task

    def cut(self, start: int, stop: int) -> np.ndarray:
        """The samples from number `start` to `stop`."""
        return self.buffer[start - self.buffer_start : stop - self.buffer_start].copy()

    def drop_before(self, sample: int) -> None:
        """Forget the samples before number `sample`."""
        count = min(max(0, sample - self.buffer_start), len(self.buffer))
        self.buffer, self.buffer_start = self.buffer[count:], self.buffer_start + count

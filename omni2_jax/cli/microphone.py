"""A spoken question from the microphone, through sounddevice (PortAudio)."""

import select
import sys
from typing import Any

import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.audio.voice_activity import WINDOW
from omni2_jax.console import say
from omni2_jax.serve.turn_detection import Change, TurnDetection, TurnDetector

SILENCE_MS = 1000  # that ends a question; people think longer than in a conversation


def open_sounddevice() -> Any:
    """The library, which has found a microphone.

    Raises ModuleNotFoundError if it is not installed, ValueError, one line, without PortAudio or a
    microphone.
    """
    try:
        import sounddevice
    except OSError as error:  # PortAudio's shared library
        raise ValueError(
            f"cannot record: {error}; install PortAudio, as with: apt install libportaudio2"
        ) from None
    try:
        sounddevice.query_devices(kind="input")
    except (ValueError, sounddevice.PortAudioError) as error:
        raise ValueError(f"cannot record, there is no microphone: {error}") from None
    return sounddevice


def record(seconds: float) -> np.ndarray:
    """One question, samples [N] at 16 kHz, `seconds` at most.

    It ends where its speaker is silent for a second, or with Enter. Raises the errors of
    `open_sounddevice`, and ValueError if the microphone cannot be read.
    """
    sounddevice = open_sounddevice()
    settings = {"samplerate": INPUT_RATE, "channels": 1, "dtype": "float32", "blocksize": WINDOW}
    say("ask your question; it ends when you are silent, or press Enter")
    try:
        with sounddevice.InputStream(**settings) as stream:
            return question(stream, int(seconds * INPUT_RATE))
    except sounddevice.PortAudioError as error:
        raise ValueError(f"cannot record: {error}") from None


def question(stream: Any, limit: int) -> np.ndarray:
    """The samples of a stream from where somebody begins to speak to where they stop.

    All samples, `limit` at most, if Enter is pressed or nobody speaks.
    """
    detector = TurnDetector(TurnDetection(silence_duration_ms=SILENCE_MS))
    blocks: list[np.ndarray] = []
    start = 0
    while sum(map(len, blocks)) - start < limit and not enter_pressed():
        block = stream.read(WINDOW)[0][:, 0]
        blocks.append(block)
        for detection in detector.feed(block):
            if detection.change is Change.STARTED:
                start = detection.sample
            elif detection.change is Change.STOPPED:
                return np.concatenate(blocks)[start : detection.sample]
    return np.concatenate([*blocks, np.zeros(0, np.float32)])[start : start + limit]


def enter_pressed() -> bool:
    """Whether a line has been typed on the terminal, which it takes."""
    if not sys.stdin.isatty() or not select.select([sys.stdin], [], [], 0)[0]:
        return False
    sys.stdin.readline()
    return True

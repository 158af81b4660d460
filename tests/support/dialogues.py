"""Made-up dialogues for the tests of the data set and of the loader."""

import numpy as np

from omni2_jax.train.data.records import Dialogue, Turn


def pcm(random: np.random.Generator, size: int) -> np.ndarray:
    """`size` random samples, 16-bit."""
    return random.integers(-32768, 32768, size, np.int16)


def spoken(name: str, turns: list[tuple[str, np.ndarray | None, np.ndarray]]) -> Dialogue:
    """A dialogue of (text, units, recording) turns; user and assistant take turns."""
    roles = ("user", "assistant")
    return Dialogue(
        name,
        tuple(
            Turn(roles[i % 2], text, units, samples=len(recording))
            for i, (text, units, recording) in enumerate(turns)
        ),
    )

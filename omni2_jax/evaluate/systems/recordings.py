"""The recordings of the items themselves, for copy synthesis: a "system" that repeats them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.systems.base import SpokenAnswer
from omni2_jax.evaluate.systems.checkpoint import checksum


class Recordings:
    """Answers every item with its own recording and text. checkpoint: what will copy them."""

    workers = 4

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "recordings, copied by a checkpoint",
            "name": self.checkpoint.name,
            "checksum": checksum(self.checkpoint),
        }

    def check(self, items: Sequence[Item]) -> None:
        """Raise ValueError for recordings that cannot be read, and for conversations."""
        for item in items:
            if len(item.turns) > 1:
                raise ValueError(f"{item.context} is a conversation, expected one recording")

    def open(self) -> Callable[[Item], SpokenAnswer]:
        def answer(item: Item) -> SpokenAnswer:
            try:
                samples = recordings.load(item.turns[0], recordings.OUTPUT_RATE)
            except ValueError as error:
                raise jobs.Refused("not readable", f"{item.context}: {error}") from None
            return SpokenAnswer(item.question, samples)

        return answer

"""The times of an answer that is spoken while it is generated, and their table."""

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import rich.table

if TYPE_CHECKING:
    from omni2_jax.generate.prompts import Sound
    from omni2_jax.generate.session import Reply, Session


class Timing:
    """Times of one answer, in seconds from the moment this object is created."""

    def __init__(self):
        self.begin = time.perf_counter()
        self.stages: dict[str, float] = {}  # how long each one took
        self.steps: list[float] = []  # when each reply had been written
        self.first_audio: float | None = None
        self.speech = 0.0  # seconds of it

    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def end_stage(self, name: str) -> None:
        """Record the time since the end of the stage before."""
        self.stages[name] = self.elapsed() - sum(self.stages.values())

    def end_step(self, speech: float) -> None:
        """Record that a reply with so many seconds of speech has been written."""
        self.steps.append(self.elapsed())
        self.speech += speech
        if speech and self.first_audio is None:
            self.first_audio = self.steps[-1]

    def table(self) -> rich.table.Table:
        """Needs at least one step."""
        total, before_steps = self.steps[-1], sum(self.stages.values())
        first = self.first_audio
        factor = f"({self.speech:.2f} s of speech in {total:.2f} s)"
        rows = {
            "time to first audio": "no audio" if first is None else milliseconds(first),
            "real-time factor": f"{total / self.speech:.3f} {factor}" if first else "no audio",
            **{name: milliseconds(seconds) for name, seconds in self.stages.items()},
            "first step": milliseconds(self.steps[0] - before_steps),
        }
        later = [end - start for start, end in itertools.pairwise(self.steps)]
        if later:
            mean, slowest = sum(later) / len(later), max(later)
            rows["later steps (mean, slowest)"] = f"{milliseconds(mean)}, {milliseconds(slowest)}"
        table = rich.table.Table(show_header=False)
        for row in rows.items():
            table.add_row(*row)
        return table


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def timed_replies(session: "Session", wav: "Sound", timing: Timing) -> "Iterator[Reply]":
    """The replies to a recording; hearing it and computing its prompt are timed as stages."""
    import jax

    features = jax.block_until_ready(session.hear(wav))
    timing.end_stage("hearing")
    replies = session.reply(features)
    jax.block_until_ready(session.engine.state)
    timing.end_stage("prefill")
    return replies

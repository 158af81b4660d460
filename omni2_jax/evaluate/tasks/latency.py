"""Latency: the time from the end of the question to the first audio (paper section 4.2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from omni2_jax import jobs
from omni2_jax.evaluate import estimates
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task


class Latency(Task):
    """Mean times over all answers, in milliseconds, and the real-time factor.

    The real-time factor is the time of all answers over the seconds of speech in them: below 1,
    speech is made faster than it is heard. Stages are reported where the system knows them.
    """

    needs_times = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "first_audio": Metric("time to first audio", "ms", 1, "low"),
        "real_time_factor": Metric("real-time factor", "", 3, "low"),
        "hearing": Metric("hearing", "ms", 1, "low"),
        "prefill": Metric("prefill", "ms", 1, "low"),
        "first_step": Metric("first step", "ms", 1, "low"),
        "later_steps": Metric("later steps", "ms", 1, "low"),
        "total": Metric("whole answer", "ms", 1, "low"),
    }

    def open(self) -> Callable[[Item, Heard], Scores]:
        return score

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        summary = {}
        for name in self.metrics:
            values = [1000 * row[name] for row in scores if name in row]
            if values:
                summary[name] = estimates.mean(values)
        if speech := [row["speech"] for row in scores]:
            totals = [row["total"] for row in scores]
            summary["real_time_factor"] = estimates.ratio(totals, speech)
        return summary


def score(item: Item, heard: Heard) -> Scores:
    """The times of an answer, in seconds, and the seconds of speech in it."""
    if not heard.samples.size:
        raise jobs.Refused("no speech", f"{item.context}: the answer has no speech")
    return {**heard.seconds, "speech": heard.samples.size / heard.rate}

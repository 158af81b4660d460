"""ASR-WER: how far speech and text of an answer agree (paper section 4.2).

A recogniser's transcript of the spoken answer is compared with the answer's own text.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from omni2_jax import jobs
from omni2_jax.evaluate import word_errors
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task
from omni2_jax.evaluate.word_errors import WordErrors


class AsrWer(Task):
    """The word error rate of all answers together, in percent.

    An answer without speech counts all its words as errors; one without words is left out.
    """

    needs_transcript = True
    metrics: ClassVar[Mapping[str, Metric]] = {"wer": Metric("ASR-WER", "%", 2, "low")}

    def describe(self):
        return {"normaliser": word_errors.NORMALISER}

    def open(self) -> Callable[[Item, Heard], Scores]:
        return score

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        counts = [WordErrors(row["errors"], row["words"]) for row in scores]
        return {"wer": word_errors.corpus_rate(counts)} if counts else {}


def score(item: Item, heard: Heard) -> Scores:
    """The word errors of an answer's speech."""
    errors = word_errors.compare(heard.text, heard.transcript or "")
    if not errors.words:
        raise jobs.Refused("no words", f"{item.context}: the answer's text has no words")
    return dataclasses.asdict(errors)

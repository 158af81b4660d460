"""What a task is: what it needs of items and answers, the scores of one answer, and their summary.

A task scores one answer at a time. Scores are journaled, so that none is computed, or paid for,
twice.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.recognisers import Recogniser

Scores = Mapping[str, Any]  # of one answer, JSON-able


@dataclass(frozen=True)
class Metric:
    """A number that a task reports.

    title: as a table names it. digits: after the decimal point. best: "high" or "low".
    """

    title: str
    unit: str = ""
    digits: int = 2
    best: str = "high"


@dataclass(frozen=True, eq=False)
class Heard:
    """An answer as a task sees it.

    samples: float32 [N] at `rate` Hz, empty without speech. transcript: what the recogniser heard,
    None if the task does not need it. seconds: see `SpokenAnswer`.
    """

    text: str
    samples: np.ndarray
    rate: int
    transcript: str | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class TaskOptions:
    """Settings of tasks; each task reads its own.

    Of copy-synthesis: checkpoint, which copies, voice, of its flow, and copies, the directory for
    the copies. Of instructions: judge, the endpoint, judge_model, its model, key_variable, the
    environment variable with its key, votes, how often each answer is judged, seed, of the votes,
    and judgements, the directory that keeps what the judge said. Of naturalness: utmos, weights in
    TorchScript.
    """

    judge: str | None = None
    judge_model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    votes: int = 1
    judgements: Path | None = None
    utmos: Path | None = None
    checkpoint: Path | None = None
    voice: str | None = None
    copies: Path | None = None
    seed: int = 0


class Task(abc.ABC):
    """One kind of measurement, bound to its settings."""

    needs_references: ClassVar[bool] = False  # the items state right answers
    needs_questions: ClassVar[bool] = False  # the items state the text of their questions
    needs_samples: ClassVar[bool] = False  # scores are computed from the speech itself
    needs_transcript: ClassVar[bool] = False  # a recogniser hears every spoken answer
    hears: ClassVar[bool] = False  # it uses `recogniser` itself, if there is one
    needs_times: ClassVar[bool] = False  # questions are answered one at a time, with a clock
    metrics: ClassVar[Mapping[str, Metric]]  # by the names in the summary
    workers: int = 4  # answers that are scored at the same time

    def __init__(self, options: TaskOptions):
        """Raises ValueError for a setting that is missing or cannot be used."""
        self.options = options
        self.recogniser: Recogniser | None = None

    def describe(self) -> dict[str, Any]:
        """Everything that decides the scores besides items and answers, JSON-able."""
        return {}

    def check(self, items: Sequence[Item]) -> None:
        """Raise ValueError, naming the item, if the items lack what the task needs."""
        for item in items:
            if self.needs_references and not item.references:
                raise ValueError(f"{item.context} has no answers, which the task needs")
            if self.needs_questions and not item.question.strip():
                raise ValueError(
                    f"{item.context} has no text of its question, which the task needs"
                )

    @abc.abstractmethod
    def open(self) -> Callable[[Item, Heard], Scores]:
        """Load what is needed -> the function that scores an answer; threads may share it.

        It raises `jobs.Refused` for an answer that cannot be scored.
        """

    @abc.abstractmethod
    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        """The metrics of the scores, without those that nothing is known about.

        scores: of the answers that could be scored. unanswered: the items without an answer.
        """

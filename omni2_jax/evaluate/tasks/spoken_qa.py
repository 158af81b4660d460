"""Spoken question answering: an answer is right if a reference occurs in it (paper section 4.2).

S2T looks for it in the answer's text, S2S in what a recogniser heard of its speech.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from omni2_jax.evaluate import estimates, word_errors
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task


class SpokenQA(Task):
    """Accuracy in percent, under two rules.

    The words of a reference occur in a row in the answer, after Whisper's normalisation, so that
    "twenty-one" is found as "21", and "art" is not found in "party". `_exist`: the reference occurs
    in the answer anywhere, both in lower case, as in UltraEval-Audio's exist_match.
    An item without an answer counts as wrong.
    """

    needs_references = True
    needs_transcript = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "s2t": Metric("S2T", "%", 1),
        "s2s": Metric("S2S", "%", 1),
        "s2t_exist": Metric("S2T exist_match", "%", 1),
        "s2s_exist": Metric("S2S exist_match", "%", 1),
    }

    def describe(self):
        return {"normaliser": word_errors.NORMALISER, "rule": "words in a row"}

    def open(self) -> Callable[[Item, Heard], Scores]:
        return score

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        count = len(scores) + len(unanswered)
        if not count:
            return {}
        return {
            name: estimates.share(sum(bool(row[name]) for row in scores), count).scaled(100)
            for name in self.metrics
        }


def score(item: Item, heard: Heard) -> Scores:
    """Whether an answer is right, under both rules, as text and as speech."""
    spoken = heard.transcript or ""
    return {
        "s2t": occurs(item.references, heard.text),
        "s2s": occurs(item.references, spoken),
        "s2t_exist": exists(item.references, heard.text),
        "s2s_exist": exists(item.references, spoken),
    }


def occurs(references: Sequence[str], answer: str) -> bool:
    """Whether the words of one of the references occur in a row in an answer."""
    words = f" {word_errors.normalised(answer)} "
    normalised = (word_errors.normalised(reference) for reference in references)
    return any(reference and f" {reference} " in words for reference in normalised)


def exists(references: Sequence[str], answer: str) -> bool:
    """Whether one of the references occurs in an answer, in lower case."""
    return any(reference.strip().lower() in answer.lower() for reference in references)

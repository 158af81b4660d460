"""Question answering by the text of answers alone, for systems that do not speak (yet)."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from omni2_jax.evaluate import estimates, word_errors
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task
from omni2_jax.evaluate.tasks.spoken_qa import occurs


class TextQA(Task):
    """Accuracy in percent: a reference occurs in the answer, and the answer is the whole reply.

    Both compare words after Whisper's normalisation. `exact` is over the items that state a whole
    reply; it is not given where none does. An item without an answer counts as wrong. `whole` is
    the share of conversations in which every answer is right, over those of several questions that
    are all scored.
    """

    needs_references = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "s2t": Metric("S2T", "%", 1),
        "exact": Metric("S2T, whole reply", "%", 1),
        "whole": Metric("S2T, whole conversations", "%", 1),
    }

    def describe(self):
        return {
            "normaliser": word_errors.NORMALISER,
            "rule": "words in a row",
            "whole": "all right",
        }

    def open(self) -> Callable[[Item, Heard], Scores]:
        return score

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        found = {}
        silent = {"s2t": len(unanswered), "exact": sum(bool(item.reply) for item in unanswered)}
        for name, missing in silent.items():
            rows = [row[name] for row in scores if row[name] is not None]
            if count := len(rows) + missing:
                found[name] = estimates.share(sum(rows), count).scaled(100)
        if whole := conversations(scores):
            found["whole"] = estimates.share(sum(whole), len(whole)).scaled(100)
        return found


def conversations(scores: Sequence[Scores]) -> list[bool]:
    """Whether all answers are right, of each conversation of several questions, all scored."""
    right: dict[str, list[bool]] = {}
    for row in scores:
        if row["asked"] > 1:
            right.setdefault(row["conversation"], []).append(row["s2t"])
    asked = {row["conversation"]: row["asked"] for row in scores}
    return [all(rows) for name, rows in right.items() if len(rows) == asked[name]]


def score(item: Item, heard: Heard) -> Scores:
    """Whether an answer is right, and whether it is the reply, None without one."""
    exact = word_errors.normalised(heard.text) == word_errors.normalised(item.reply)
    return {
        "s2t": occurs(item.references, heard.text),
        "exact": exact if item.reply else None,
        "conversation": item.conversation,
        "asked": item.asked,
    }

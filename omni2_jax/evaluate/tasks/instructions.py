"""Instruction following: a language model judges each answer from 1 to 5 (paper appendix A).

S2T judges the answer's text, S2S what a recogniser heard of its speech. The criteria are the
paper's, in other words.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from omni2_jax import jobs
from omni2_jax.answer_cache import AnswerCache, digest
from omni2_jax.endpoints import AnswerError, Client, Endpoint
from omni2_jax.evaluate import estimates
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task, TaskOptions

LOWEST, HIGHEST = 1, 5
TRIES = 3  # requests for one vote, if what the judge says cannot be read
MAX_TOKENS = 200  # of a judgement

CRITERIA = """\
You grade the answers of a voice assistant. A user speaks an instruction and hears the answer.
Look at four things:
1. Helpfulness: the answer does what was asked, with enough and correct content.
2. Relevance: it keeps to the instruction and adds nothing that the user does not need.
3. Fluency: it is grammatical, complete and easy to follow.
4. Fitness for speech: it sounds natural when spoken, is not too long, and has no lists, tables,
   code, links or symbols that cannot be read aloud.
Give one score for all of it, a whole number from 1 (bad) to 5 (excellent).
Reply with JSON alone: {"score": N}"""


class Instructions(Task):
    """The mean score of the judge over all answers and votes.

    An answer without words, and an item without an answer, get the lowest score without asking.
    """

    needs_questions = True
    needs_transcript = True
    workers = 8
    metrics: ClassVar[Mapping[str, Metric]] = {
        "score_s2t": Metric("score S2T"),
        "score_s2s": Metric("score S2S"),
    }

    def __init__(self, options: TaskOptions):
        super().__init__(options)
        if not options.judge or not options.judge_model:
            raise ValueError("the task instructions needs a judge: give --judge and --judge-model")
        if options.judgements is None:
            raise ValueError("the task instructions needs a directory for judgements")
        self.client = Client(Endpoint(options.judge, options.judge_model, options.key_variable))

    def describe(self) -> dict[str, Any]:
        return {
            "judge": self.options.judge_model,
            "votes": self.options.votes,
            "criteria": digest({"criteria": CRITERIA})[:16],
            "seed": self.options.seed,
        }

    def check(self, items: Sequence[Item]) -> None:
        """Also raises EndpointError if the judge cannot be used."""
        super().check(items)
        self.client.check()

    def open(self) -> Callable[[Item, Heard], Scores]:
        assert self.options.judgements
        cache = AnswerCache(self.options.judgements)

        def score(item: Item, heard: Heard) -> Scores:
            return {
                "score_s2t": self.votes(cache, item, heard.text),
                "score_s2s": self.votes(cache, item, heard.transcript or ""),
            }

        return score

    def votes(self, cache: AnswerCache, item: Item, answer: str) -> list[int]:
        """The scores of an answer, one a vote. Raises Refused if no vote can be read."""
        if not any(character.isalnum() for character in answer):
            return [LOWEST] * self.options.votes
        found = [self.vote(cache, item, answer, number) for number in range(self.options.votes)]
        readable = [score for score in found if score is not None]
        if not readable:
            raise jobs.Refused("unreadable judgement", f"{item.context}: the judge gave no score")
        return readable

    def vote(self, cache: AnswerCache, item: Item, answer: str, number: int) -> int | None:
        """One vote, from the cache if it was asked before; None if it cannot be read."""
        messages = [
            {"role": "system", "content": CRITERIA},
            {"role": "user", "content": f"Instruction: {item.question}\n\nAnswer: {answer}"},
        ]
        temperature = 0.0 if self.options.votes == 1 else 1.0
        for attempt in range(TRIES):
            seed = self.options.seed + number + 1000 * attempt
            sampling = {"temperature": temperature, "seed": seed}
            request = {"model": self.options.judge_model, "messages": messages, **sampling}
            said = cache.get(request)
            if said is None:
                try:
                    said = self.client.chat(messages, max_tokens=MAX_TOKENS, json=True, **sampling)
                except AnswerError:
                    continue
                cache.put(request, said)
            if (score := parsed(said)) is not None:
                return score
        return None

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        lowest = [float(LOWEST)] * len(unanswered)
        return {
            name: estimates.mean([*(sum(row[name]) / len(row[name]) for row in scores), *lowest])
            for name in self.metrics
            if scores or unanswered
        }


def parsed(said: str) -> int | None:
    """The score in what a judge said; None if there is none from 1 to 5."""
    try:
        value = json.loads(said)["score"]
        score = int(value)
    except (ValueError, TypeError, KeyError):
        return None
    return score if float(value) == score and LOWEST <= score <= HIGHEST else None

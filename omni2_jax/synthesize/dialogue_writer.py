"""Dialogues that a chat model writes: one seed becomes one dialogue, turn after turn.

The recipe is the paper's (section 3): the instruction is said anew for speech, the model replies,
and then says what the user asks next, on the history. The number of turns is drawn from a Poisson
distribution and clipped.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni2_jax.answer_cache import AnswerCache
from omni2_jax.endpoints import AnswerError, Client, Endpoint, TooLongError
from omni2_jax.jobs import Refused, Result
from omni2_jax.synthesize import prompts, spoken
from omni2_jax.synthesize.records import TextDialogue, TextTurn
from omni2_jax.synthesize.spoken import Limits

MAX_SEED_WORDS = 200  # longer instructions are refused before they are paid for
TOKENS_PER_WORD = 4  # that a reply may have; it is cut off beyond


@dataclass(frozen=True)
class WriterSettings:
    """What the dialogues depend on, besides seeds and model.

    mean_turns: of the Poisson distribution; max_turns: where it is clipped. question_words,
    reply_words: the longest that are allowed. attempts: how often a text is asked for until it can
    be spoken. seed: of the numbers of turns, and of the model where it takes one.
    """

    mean_turns: float = 2.0
    max_turns: int = 5
    question_words: int = 60
    reply_words: int = 100
    numbers_as_words: bool = False
    attempts: int = 3
    temperature: float = 0.8
    seed: int = 0

    def as_header(self) -> dict[str, Any]:
        """For the journal of a job: the settings, and a text that changes with the prompts."""
        texts = [prompts.STYLE, prompts.NUMBERS, prompts.REWRITE, prompts.REPLY]
        texts += [prompts.NEXT_QUESTION, prompts.AGAIN]
        return {**dataclasses.asdict(self), "prompts": digest("\n".join(texts))[:12]}


class DialogueWriter:
    """Writes the dialogue of a payload {"key", "text", "fault"}, see `seeds.Seed`. Its topic is the
    name of the seeds' file.

    cache: a directory for the answers, see `AnswerCache`. Raises EndpointError or AnswerError if
    the server is not there, or does not answer a trial.
    """

    def __init__(self, endpoint: Endpoint, settings: WriterSettings, cache: Path):
        self.client, self.settings = Client(endpoint), settings
        self.client.check()
        trial = [{"role": "user", "content": prompts.TRIAL}]
        self.client.chat(trial, temperature=settings.temperature, max_tokens=64, seed=settings.seed)
        self.cache = AnswerCache(cache)

    def __call__(self, payload: Mapping[str, str]) -> Result:
        """The dialogue, as a line of `records`. It has fewer turns if a later one is refused."""
        key = payload["key"]
        if payload["fault"]:
            raise Refused("unreadable seed", payload["fault"])
        if len(payload["text"].split()) > MAX_SEED_WORDS:
            raise Refused("long seed", f"it has more than {MAX_SEED_WORDS} words")
        turns = [self.first_turn(key, payload["text"])]
        shortened = ""
        while len(turns) < number_of_turns(key, self.settings) and not shortened:
            try:
                turns.append(self.next_turn(key, turns))
            except Refused as refusal:
                shortened = refusal.reason
        texts = [TextTurn(question, reply) for question, reply in turns]
        dialogue = TextDialogue(key, "seen", key.rpartition("-")[0], texts)
        return Result({"dialogue": dataclasses.asdict(dialogue), "shortened": shortened})

    def first_turn(self, key: str, seed: str) -> tuple[str, str]:
        messages = self.prompt(prompts.REWRITE, self.questions, seed)
        question = self.text(f"{key} question 0", messages, self.questions)
        if question.strip(".! ").upper() == prompts.SKIP:
            raise Refused("not for speech", f"the model skips {seed!r:.80}")
        return question, self.reply(key, [], question)

    def next_turn(self, key: str, turns: Sequence[tuple[str, str]]) -> tuple[str, str]:
        messages = self.prompt(prompts.NEXT_QUESTION, self.questions, prompts.conversation(turns))
        question = self.text(f"{key} question {len(turns)}", messages, self.questions)
        return question, self.reply(key, turns, question)

    def reply(self, key: str, turns: Sequence[tuple[str, str]], question: str) -> str:
        messages = self.prompt(prompts.REPLY, self.replies)
        for asked, replied in turns:
            messages += [said("user", asked), said("assistant", replied)]
        messages += [said("user", question)]
        return self.text(f"{key} reply {len(turns)}", messages, self.replies)

    @property
    def questions(self) -> Limits:
        return Limits(self.settings.question_words, self.settings.numbers_as_words)

    @property
    def replies(self) -> Limits:
        return Limits(self.settings.reply_words, self.settings.numbers_as_words)

    def prompt(self, prompt: str, limits: Limits, *texts: str) -> list[dict[str, str]]:
        system = prompts.system(prompt, limits.max_words, limits.numbers_as_words)
        return [system, *(said("user", text) for text in texts)]

    def text(self, name: str, messages: list[dict[str, str]], limits: Limits) -> str:
        """The model's answer, which is asked for again until it can be spoken.

        name: of this text among all, for the model's seed. Raises Refused.
        """
        fault = ""
        for attempt in range(self.settings.attempts):
            try:
                answer = self.answer(
                    messages, seed_of(f"{name} {attempt}", self.settings.seed), limits
                )
                fault = spoken.fault(answer, limits) or ""
            except TooLongError:
                answer, fault = "", "too long"
            except AnswerError as error:
                raise Refused("no answer", str(error)) from None
            if not fault:
                return spoken.cleaned(answer)
            again = said("user", prompts.AGAIN.format(fault=fault))
            messages = [*messages, *([said("assistant", answer)] if answer else []), again]
        raise Refused(fault, f"{name}: {answer!r:.80}")

    def answer(self, messages: list[dict[str, str]], seed: int, limits: Limits) -> str:
        """An answer from the cache or the model."""
        request: dict[str, Any] = {
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": TOKENS_PER_WORD * limits.max_words,
            "seed": seed,
        }
        paid = {"model": self.client.endpoint.model, **request}
        answer = self.cache.get(paid)
        if answer is None:
            answer = self.client.chat(**request)
            self.cache.put(paid, answer)
        return answer


def number_of_turns(key: str, settings: WriterSettings) -> int:
    """How many turns the dialogue of a seed has: Poisson, clipped from 1 to `max_turns`."""
    draw = np.random.default_rng(seed_of(key, settings.seed)).poisson(settings.mean_turns)
    return int(np.clip(draw, 1, settings.max_turns))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def seed_of(name: str, seed: int) -> int:
    """A number of 31 bits that follows from a name and the user's seed."""
    return int(digest(f"{seed} {name}")[:8], 16) >> 1


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""The items of a conversation in the Realtime API, and the turns of the model that they make up.

The API knows a list of items: messages of the user, of the assistant and of the system, in any
order. The model knows turns: a question and its answer. Items of the user that follow one another
are one question. The session's cache is kept as long as the items before the new question are the
turns that it holds.
"""

import asyncio
import itertools
import math
import secrets
from dataclasses import dataclass, field

import jax

from omni2_jax.audio.recordings import OUTPUT_RATE
from omni2_jax.generate.session import Question, Session, Turn
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits

# Units that speech takes for a text token, where an answer was interrupted and its own rate is not
# known: English at 150 words a minute, 0.75 words a token, 25 units a second.
UNITS_PER_TOKEN = 7.5
FORGOTTEN = "\0forgotten"  # stands for features that were dropped; compared by identity


def new_id(prefix: str) -> str:
    """A random id, as "item_0f3c..."."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(eq=False)
class Item:
    """A message. Its parts are texts and, of a spoken turn, segments of speech features [F, D]."""

    id: str
    role: str  # "user", "assistant" or "system"
    parts: list[str | jax.Array]
    is_audio: bool = False
    status: str = "completed"  # "in_progress", "incomplete" or "failed"
    transcript: str | None = None  # of the user's speech, by a recogniser
    hearing: asyncio.Task | None = None  # computes the features of the user's speech
    written: int = 0  # characters that the client has sent
    is_forgotten: bool = False  # whether its features were dropped (`forget_features`)
    # Of an answer that the model has given: its tokens, its units and samples at 24 kHz.
    answer: list[int] = field(default_factory=list)
    num_units: int = 0
    num_samples: int = 0

    def describe(self) -> dict:
        """The item as the API writes it, without its audio."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            # The API's items do not fail.
            "status": "incomplete" if self.status == "failed" else self.status,
            "role": self.role,
            "content": self.content(),
        }

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    def content(self) -> list[dict]:
        if self.status == "in_progress" and not self.parts:
            return []  # clients add the part when `response.content_part.added` comes
        if self.is_audio:
            kind = "output_audio" if self.role == "assistant" else "input_audio"
            return [{"type": kind, "transcript": self.text or self.transcript}]
        kind = "output_text" if self.role == "assistant" else "input_text"
        return [{"type": kind, "text": self.text}]

    def tokens_heard(self, milliseconds: int) -> int:
        """How many tokens of the answer's text were said in the first `milliseconds` of its audio.

        Raises EventError if the audio is shorter. The model's text is ahead of its speech and has
        no time stamps, so that this is an estimate: the speech is taken to be even.
        """
        duration = self.num_samples * 1000 / OUTPUT_RATE
        if milliseconds > math.ceil(duration):
            raise EventError(
                f"audio_end_ms is {milliseconds}, but the audio has {duration:.0f} ms",
                param="audio_end_ms",
            )
        if milliseconds == 0:
            return 0
        heard = milliseconds / duration
        if self.status == "completed":
            return math.ceil(heard * len(self.answer))
        return min(len(self.answer), math.ceil(heard * self.num_units / UNITS_PER_TOKEN))


class Conversation:
    """The items of one conversation, in their order."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.items: list[Item] = []

    def find(self, item_id: str, use: str, param: str = "item_id") -> Item:
        """The item of an id. Raises EventError, whose code names the use, if there is none."""
        for item in self.items:
            if item.id == item_id:
                return item
        raise EventError(f"there is no item {item_id!r}", f"item_{use}_invalid_item_id", param)

    def add(self, item: Item, previous: str | None = None) -> tuple[str | None, list[Item]]:
        """Insert an item behind the item `previous` -> the id of the item before it, those removed.

        previous: "root" is the beginning, None the end. The oldest items are removed from a
        conversation that is full. Raises EventError, and changes nothing, for an unknown
        `previous`, an id that exists, and a conversation that is too full for the item.
        """
        if any(other.id == item.id for other in self.items):
            raise EventError(f"there is an item {item.id!r} already", param="item.id")
        before = None
        if previous not in (None, "root"):
            before = self.find(previous, "create", "previous_item_id")
        removed = self.superfluous(item, before)
        self.items = [other for other in self.items if other not in removed]
        if previous == "root":
            index = 0
        else:
            index = self.items.index(before) + 1 if before else len(self.items)
        self.items.insert(index, item)
        return self.items[index - 1].id if index else None, removed

    def superfluous(self, item: Item, before: Item | None) -> list[Item]:
        """The oldest items, as many as must be removed to make room for `item`.

        Messages of the system stay, as does an answer that is being generated, and `before`, behind
        which `item` is inserted. Raises EventError if there is no room beside these.
        """
        limits, removed = self.limits, []
        count = len(self.items) + 1
        written = item.written + sum(other.written for other in self.items)
        for other in self.items:
            if count <= limits.items and written <= limits.characters:
                break
            if other.role != "system" and other.status != "in_progress" and other is not before:
                removed.append(other)
                count, written = count - 1, written - other.written
        if count > limits.items or written > limits.characters:
            raise EventError(
                f"a conversation has at most {limits.items} items and {limits.characters} "
                "characters that the client has written",
                "conversation_full",
            )
        return removed

    def delete(self, item_id: str) -> None:
        """Remove an item. Raises EventError if there is none of this id."""
        self.items.remove(self.find(item_id, "delete"))

    def forget_features(self, segments: int) -> None:
        """Drop speech features that are older than the newest `segments`.

        No prompt can hold them any more, and each takes some megabytes. A turn whose features no
        response has asked for counts as one segment. One that is being heard stays: a response may
        wait for it, and `Limits.hearings` bounds their number.
        """
        for item in reversed(self.items):
            features = sum(not isinstance(part, str) for part in item.parts)
            features += item.hearing is not None
            segments -= features
            is_heard = item.hearing is None or item.hearing.done()
            if features and segments < 0 and is_heard:
                item.parts, item.hearing, item.is_forgotten = [], None, True

    def question(self, session: Session, items: list[Item]) -> list[str | jax.Array]:
        """Make `session` hold the turns of `items` before the last question -> that question.

        Its cache is kept if it holds these turns, or the newest of them. Otherwise it gets those
        whose features are not forgotten.

        items: those of this conversation that are to be answered. Raises EventError if there is
        nothing to answer, or if the question was too long to be kept.
        """
        turns: list[Turn] = []
        question: list[str | jax.Array] | None = None
        for item in items:
            if item.role == "system":
                continue
            if item.role == "user":
                parts = [FORGOTTEN] if item.is_forgotten else item.parts
                question = [*(question or ()), *parts]
            elif item.status == "failed":
                continue
            elif question is not None:
                turns.append(Turn(question, self.answer_tokens(item, session)))
                question = None
            elif turns:  # two answers in a row
                turns[-1].answer = [*turns[-1].answer, *self.answer_tokens(item, session)]
        if question and is_forgotten(question):
            raise EventError(
                "the user's turns since the last answer are longer than a conversation may be",
                "question_too_long",
            )
        # A question without parts is one in which no speech was heard.
        if question is None or not (question or session.tokenizer.config.no_speech_reply):
            raise EventError(
                "the conversation does not end with the user's turn", "nothing_to_answer"
            )
        # The session may have dropped its oldest turns.
        held = len(session.turns)
        if bool(held) != bool(turns) or not same_turns(turns[len(turns) - held :], session.turns):
            known = itertools.takewhile(lambda turn: not is_forgotten(turn.question), turns[::-1])
            session.resume(list(known)[::-1])
        return question

    def unanswered(self, items: list[Item]) -> list[Item]:
        """The user's messages among `items` that make up their last question."""
        question: list[Item] = []
        for item in items:
            if item.role == "user":
                question.append(item)
            elif item.role == "assistant" and item.status != "failed":
                question = []
        return question

    def answer_tokens(self, item: Item, session: Session) -> list[int]:
        """The tokens of an assistant's message; those of the model's own answer as they were."""
        if not item.answer:
            item.answer = session.tokenizer.answer(item.text)
        return item.answer

    def instructions(self, instructions: str | None) -> str | None:
        """The system message: the session's instructions and the system items, or None."""
        texts = [instructions] if instructions else []
        for item in self.items:
            if item.role == "system":
                texts += [part for part in item.parts if isinstance(part, str)]
        return "\n".join(texts) or None


def is_forgotten(question: Question) -> bool:
    """Whether a part of it was forgotten."""
    return any(part is FORGOTTEN for part in question)


def same_turns(turns: list[Turn], others: list[Turn]) -> bool:
    """Whether two lists of turns have the same features, texts and answers."""
    return len(turns) == len(others) and all(
        a.answer == b.answer and same_question(a.question, b.question)
        for a, b in zip(turns, others, strict=True)
    )


def same_question(a, b) -> bool:
    """Whether they have the same parts. What was forgotten of `a` may be anything in `b`."""
    if is_forgotten(a):
        return True
    return len(a) == len(b) and all(
        x is y or (isinstance(x, str) and x == y) for x, y in zip(a, b, strict=True)
    )

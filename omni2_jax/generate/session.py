"""A conversation of several turns: speech or text in, text and speech out, step by step.

    session = model.session(voice="jane")
    for reply in session.respond("question.wav"):
        reply.text, reply.units, reply.samples

The LLM's cache is kept from turn to turn, so that a new turn only computes its own positions.
`interrupt` stops an answer at once; leaving the loop does the same. `truncate` makes the session
forget the end of the last answer, which the user did not hear.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint.tokenizer import Tokenizer, parse_units
from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream, shortened
from omni2_jax.generate.prompts import Sound, forced_ids, split
from omni2_jax.generate.read_write_state import ReadWriteState, Request


@dataclass(frozen=True)
class Reply:
    """What one step adds to an answer."""

    text: str
    units: list[int]  # 25 a second
    unit_text: str  # the units as the released scripts write them, "<12><6560>"
    samples: np.ndarray  # float32 [N], 24 kHz
    text_tokens: list[int]  # of the text, with special tokens


# The parts of a turn in their order: texts, and speech features [F, D] of segments.
Question = Sequence[str | jax.Array]


@dataclass
class Turn:
    """One exchange of the conversation."""

    question: Question
    answer: list[int]  # text tokens that were delivered


class Session:
    """One conversation. It uses an engine that other sessions may share.

    `Omni2.session` creates one. At most one answer is generated at a time.
    """

    def __init__(
        self,
        hear: Callable[..., list[jax.Array]],
        engine: Engine,
        tokenizer: Tokenizer,
        request: Request,
        voice: jax.Array | None,
        overflow: str = "error",
        instructions: str | None = None,
    ):
        """hear: the function from a sound to its speech features, [F, D] of every segment.

        request: the settings of every turn. voice: x-vector [192]; None without a decoder.
        overflow: if the conversation does not fit the LLM's cache any more, "error" refuses the
        turn, "drop" drops the oldest turns, until the rest takes half of the cache. Raises
        ValueError for another value.
        instructions: the system message; None is the chat template's own.
        """
        if overflow not in ("error", "drop"):
            raise ValueError(f"overflow is {overflow!r}, expected 'error' or 'drop'")
        self.hear, self.engine, self.tokenizer = hear, engine, tokenizer
        self.request, self.voice, self.overflow = request, voice, overflow
        self.instructions = instructions
        self.eos = {int(token) for token in np.asarray(request.text_eos[0]) if token >= 0}
        self.turns: list[Turn] = []
        self.prefix: ReadWriteState | None = None
        self.length = 0  # LLM positions of the prefix
        self.num_cached = 0  # turns that the prefix holds
        self.stream: ResponseStream | None = None  # the answer that is being generated

    def respond(self, sound: Sound) -> Iterator[Reply]:
        """Answer a spoken turn. Leaving the loop early interrupts the answer.

        sound: a file, or samples [N] at 16 kHz, floats from -1 to 1 or int16. Raises ValueError for
        bad audio or a conversation that is too long, RuntimeError while another answer is being
        generated, QueueFullError, and GenerationError.
        """
        self.check_idle()
        yield from self.reply(self.hear(sound))

    def reply(self, question: Question, say: str | None = None) -> Iterator[Reply]:
        """Answer a turn: speech features, as `hear` returns them, a text, or both.

        say: the text of the answer, if the model is not to choose it; it is spoken as if it did.
        A question of no parts, in which `hear` found no speech, gets the checkpoint's
        `no_speech_reply`, if it has one.
        When this method returns, the prompt has been dispatched to the device, unless other
        sessions speak with this engine: then its next steps compute it (see `Engine.step`).
        Iterate over the result, or call `interrupt`. Raises the errors of `respond`, and ValueError
        for a text that cannot be said (`prompts.forced_ids`).
        """
        self.check_idle()
        question = [question] if isinstance(question, str) else list(question)
        request = self.request
        if not question and say is None:
            say = self.tokenizer.config.no_speech_reply or None
        if say is not None:
            request = request.saying(forced_ids(self.tokenizer, say))
        pieces, prefix = self.prompt(question, int(request.max_text[0]))
        stream = self.stream = self.engine.submit(
            pieces, request, self.voice, prefix, self.length, keep_prefix=True
        )
        turn = Turn(question, [])
        self.turns.append(turn)
        try:
            if self.engine.is_idle:
                self.engine.admit()
        except BaseException:
            self.interrupt()
            raise
        return self.deliver(stream, turn)

    def deliver(self, stream: ResponseStream, turn: Turn) -> Iterator[Reply]:
        """The replies of a stream; afterwards the session is ready for the next turn."""
        try:
            yield from replies(stream, self.tokenizer, turn.answer)
        finally:
            # Otherwise `interrupt` was called before, and another answer may have begun.
            if self.stream is stream:
                self.interrupt()

    def check_idle(self) -> None:
        """Raise RuntimeError while an answer is being generated."""
        if self.stream is not None:
            raise RuntimeError("the last answer is not complete yet; interrupt() it first")

    def interrupt(self) -> None:
        """Stop the answer at once. What was delivered stays in the conversation."""
        if self.stream is None:
            return
        stream, self.stream = self.stream, None
        if stream.outputs or not stream.done:
            stream.cancel()
        if stream.error:  # the next turn follows the turns before the failed one
            self.turns.pop()
        self.prefix = stream.prefix
        self.length = stream.num_delivered if stream.prefix is not None else 0
        if stream.slot is not None:  # otherwise its prompt was taken back
            self.num_cached = len(self.turns)

    def resume(self, turns: Sequence[Turn]) -> None:
        """Go on from other turns than those of this session; the next turn computes all of them.

        Raises RuntimeError while an answer is being generated.
        """
        self.check_idle()
        self.turns, self.prefix, self.length = list(turns), None, 0

    def truncate(self, tokens: int) -> None:
        """Keep only the first `tokens` text tokens of the last answer.

        The next turn goes on from there. Raises RuntimeError while an answer is being generated.
        """
        self.check_idle()
        if not self.turns:
            return
        answer = self.turns[-1].answer
        removed = len(answer[tokens:])
        del answer[tokens:]
        if self.prefix is not None:
            self.length -= removed
            self.prefix = shortened(self.prefix, self.length)

    def prompt(
        self, question: Question, max_text: int
    ) -> tuple[list[PromptPiece], ReadWriteState | None]:
        """The prompt of a new turn, and the prefix that it follows.

        max_text: text tokens of its answer at most.
        If the turn does not fit behind the prefix, the prompt is that of the whole conversation
        (overflow "drop": of its newest turns), and the prefix is None. Raises ValueError if that
        does not fit either.
        """
        limit = self.engine.engine_config.llm_capacity - max_text
        if self.prefix is not None:
            ids, questions = self.continuation(question)
            if self.length + len(ids) <= limit:
                return self.split(ids, questions), self.prefix
        if self.overflow == "drop":
            turns, ids = self.newest_dialogue(question, limit, limit)
            if len(turns) < len(self.turns):
                # Later turns find room behind half of what fits. Otherwise each of them would have
                # to compute the conversation anew.
                turns, ids = self.newest_dialogue(question, limit // 2, limit)
            what, hint = "turn", ""
        else:
            turns, ids = self.turns, self.dialogue(self.turns, question)
            what = "conversation"
            hint = "; start a new conversation, or use overflow='drop' to drop the oldest turns"
        if len(ids) <= limit:
            self.resume(turns)
            return self.split(ids, [*(turn.question for turn in turns), question]), None
        raise ValueError(
            f"the {what} takes {len(ids)} positions and its answer up to {max_text} more, "
            f"but the LLM's cache has {self.engine.engine_config.llm_capacity}{hint}"
        )

    def split(self, ids: list[int], questions: Sequence[Question]) -> list[PromptPiece]:
        """The pieces of a prompt that holds these questions."""
        parts = [part for question in questions for part in question]
        features = [part for part in parts if not isinstance(part, str)]
        if not features:
            width = self.engine.config.llm.width
            features = [jnp.zeros((self.tokenizer.positions, width), self.engine.dtype)]
        return split(ids, features, self.engine.engine_config.prefill_size)

    def has_ended(self, turn: Turn) -> bool:
        """Whether an answer has its end token; it has none if it was cut short."""
        return bool(turn.answer) and turn.answer[-1] in self.eos

    def continuation(self, question: Question) -> tuple[list[int], list[Question]]:
        """What follows the prefix in the prompt of a new turn, and the questions in it.

        These are those of turns that were interrupted before they had a slot, and the new one.
        """
        last, *others = self.turns[self.num_cached - 1 :]
        questions = [*(turn.question for turn in others), question]
        ids = self.tokenizer.continuation(content(questions[0]), self.has_ended(last))
        for turn, following in zip(others, questions[1:], strict=True):
            ids += self.exchange(turn, following)
        return ids, questions

    def newest_dialogue(
        self, question: Question, room: int, limit: int
    ) -> tuple[list[Turn], list[int]]:
        """As many of the newest turns as fit into `room` positions, and their `dialogue`.

        The newest one is also taken if it fits into `limit`. What does not fit is not tokenized;
        this takes no longer for a longer conversation.
        """
        turns: list[Turn] = []
        ids, following, later = self.dialogue([], question), question, []
        for turn in reversed(self.turns):
            later = self.exchange(turn, following) + later
            longer = self.dialogue([], turn.question) + later
            if len(longer) > (room if turns else limit):
                break
            turns, ids, following = [turn, *turns], longer, turn.question
        return turns, ids

    def dialogue(self, turns: list[Turn], question: Question) -> list[int]:
        """The prompt of a conversation: `turns` with their answers, then a question.

        Its token ids equal those that the turns put into the cache one after the other.
        """
        first, *later = [*(turn.question for turn in turns), question]
        ids = self.tokenizer.prompt([content(first)], self.instructions)
        for turn, following in zip(turns, later, strict=True):
            ids += self.exchange(turn, following)
        return ids

    def exchange(self, turn: Turn, question: Question) -> list[int]:
        """What follows the question of a turn in a prompt: its answer, and the next question."""
        next_turn = self.tokenizer.continuation(content(question), self.has_ended(turn))
        return [*turn.answer, *next_turn]


def content(question: Question) -> list[str | int]:
    """A question as the tokenizer takes it: its texts, and 1 for each of its segments."""
    return [part if isinstance(part, str) else 1 for part in question]


def replies(stream: ResponseStream, tokenizer: Tokenizer, answer: list[int]) -> Iterator[Reply]:
    """The outputs of a stream as replies; the text tokens are also appended to `answer`.

    Text is delivered in whole characters: a character may need the tokens of several steps.
    """
    delivered = ""
    for output in stream:
        answer += output.text_tokens
        text = tokenizer.decode(answer)
        is_last = stream.done and not stream.outputs
        whole = text if is_last else text.rstrip("\ufffd")
        new_text = whole[len(delivered) :]
        delivered = max(delivered, whole, key=len)
        unit_text = tokenizer.unit_text(output.speech_tokens)
        units = parse_units(unit_text, tokenizer.config.units)
        yield Reply(new_text, units, unit_text, output.samples, output.text_tokens)

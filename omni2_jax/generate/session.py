"""A conversation of several turns: speech in, text and speech out, step by step.

    session = model.session(voice="jane")
    for reply in session.respond("question.wav"):
        reply.text, reply.units, reply.samples

The LLM's cache is kept from turn to turn, so that a new turn only computes its own positions.
`interrupt` stops an answer at once; leaving the loop does the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from omni2_jax.checkpoint.tokenizer import Tokenizer, parse_units
from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream
from omni2_jax.generate.prompts import Sound, split
from omni2_jax.generate.read_write import ReadWriteState, Request


@dataclass(frozen=True)
class Reply:
    """What one step adds to an answer."""

    text: str
    units: list[int]  # 25 a second
    unit_text: str  # the units as the released scripts write them, "<12><6560>"
    samples: np.ndarray  # float32 [N], 24 kHz


@dataclass
class Turn:
    """One exchange of the conversation: the user's speech features and the model's text."""

    features: list[jax.Array]  # [300, D] for every segment of 30 s
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
    ):
        """hear: the function from a sound to its speech features, [300, D] for each 30 s segment.

        request: the settings of every turn. voice: x-vector [192]; None without a decoder.
        overflow: if the conversation does not fit the LLM's cache any more, "error" refuses the
        turn, "drop" drops the oldest turns. Raises ValueError for another value.
        """
        if overflow not in ("error", "drop"):
            raise ValueError(f"overflow is {overflow!r}, expected 'error' or 'drop'")
        self.hear, self.engine, self.tokenizer = hear, engine, tokenizer
        self.request, self.voice, self.overflow = request, voice, overflow
        self.eos = {int(token) for token in np.asarray(request.text_eos[0]) if token >= 0}
        self.turns: list[Turn] = []
        self.prefix: ReadWriteState | None = None
        self.length = 0  # LLM positions of the prefix
        self.stream: ResponseStream | None = None  # the answer that is being generated

    def respond(self, sound: Sound) -> Iterator[Reply]:
        """Answer a spoken turn. Leaving the loop early interrupts the answer.

        sound: a file, or samples [N] at 16 kHz. Raises ValueError for bad audio or a conversation
        that is too long, RuntimeError while another answer is being generated, QueueFullError, and
        GenerationError.
        """
        self.check_idle()
        yield from self.reply(self.hear(sound))

    def reply(self, features: list[jax.Array]) -> Iterator[Reply]:
        """Answer a turn whose speech features are given, as `hear` returns them.

        When this method returns, the prompt has been dispatched to the device if a slot is free.
        Iterate over the result, or call `interrupt`. Raises the errors of `respond`.
        """
        self.check_idle()
        pieces, prefix = self.prompt(features)
        stream = self.stream = self.engine.submit(
            pieces, self.request, self.voice, prefix, self.length, keep_prefix=True
        )
        turn = Turn(features, [])
        self.turns.append(turn)
        try:
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

    def prompt(self, features: list[jax.Array]) -> tuple[list[PromptPiece], ReadWriteState | None]:
        """The prompt of a new turn, and the prefix that it follows.

        If the turn does not fit behind the prefix, the prompt is that of the whole conversation
        (overflow "drop": of the newest turns that fit), and the prefix is None. Raises ValueError
        if that does not fit either.
        """
        config = self.engine.engine_config
        max_text = int(self.request.max_text[0])
        limit = config.llm_capacity - max_text
        if self.prefix is not None:
            ids = self.tokenizer.continuation(len(features), self.has_ended(self.turns[-1]))
            if self.length + len(ids) <= limit:
                return split(ids, features, config.prefill_size), self.prefix
        num_turns = len(self.turns)
        for first in range(num_turns + 1 if self.overflow == "drop" else 1):
            turns = self.turns[first:]
            ids = self.dialogue(turns, len(features))
            if len(ids) <= limit:
                self.turns, self.prefix, self.length = turns, None, 0
                all_features = [f for turn in turns for f in turn.features] + features
                return split(ids, all_features, config.prefill_size), None
        raise ValueError(
            f"the conversation takes {len(ids)} positions and its answer up to {max_text} more, "
            f"but the LLM's cache has {config.llm_capacity}; start a new conversation, or use "
            "overflow='drop' to drop the oldest turns"
        )

    def has_ended(self, turn: Turn) -> bool:
        """Whether an answer has its end token; it has none if it was cut short."""
        return bool(turn.answer) and turn.answer[-1] in self.eos

    def dialogue(self, turns: list[Turn], segments: int) -> list[int]:
        """The prompt of a conversation: `turns` with their answers, then one of so many segments.

        Its token ids equal those that the turns put into the cache one after the other.
        """
        if not turns:
            return self.tokenizer.prompt([segments])
        ids = self.tokenizer.prompt([len(turns[0].features)])
        next_segments = [len(turn.features) for turn in turns[1:]] + [segments]
        for turn, count in zip(turns, next_segments, strict=True):
            ids += [*turn.answer, *self.tokenizer.continuation(count, self.has_ended(turn))]
        return ids


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
        yield Reply(new_text, units, unit_text, output.samples)

"""A conversation: spoken turns in, text and speech out as they are made. The LLM's cache lives on from turn to turn.

    session = model.session(voice="jane")
    for chunk in session.respond("question.wav"):
        chunk.text, chunk.units, chunk.samples

`interrupt` stops an answer at once; leaving the loop does the same.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from omni2_jax.checkpoint.tokenizer import Tokenizer, parse_units
from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream
from omni2_jax.generate.read_write import ReadWriteState, Request
from omni2_jax.models.model import SPEECH


@dataclass(frozen=True)
class Reply:
    """What one step added to the answer: text, units (25 a second), the same as the released scripts spell them, samples at 24 kHz."""

    text: str
    units: list[int]
    unit_text: str
    samples: np.ndarray


@dataclass
class Turn:
    """One exchange of the past: what the user said, as the LLM heard it, and what the model answered."""

    features: list[jax.Array]  # [300, D] for every 30 s
    answer: list[int]


class Session:
    """One speaker's conversation over an engine that others may share. `Omni2.session` makes one."""

    def __init__(
        self,
        hear: Callable,
        engine: Engine,
        tokenizer: Tokenizer,
        request: Request,
        voice: jax.Array | None,
        overflow: str = "error",
    ):
        """hear: sound -> its speech features; overflow: when the conversation outgrows the engine's LLM cache, "error" refuses
        the turn, "drop" forgets the oldest turns."""
        if overflow not in ("error", "drop"):
            raise ValueError(f"overflow is {overflow!r}, expected 'error' or 'drop'")
        self.hear, self.engine, self.tokenizer, self.overflow = hear, engine, tokenizer, overflow
        self.request, self.voice = request, voice
        self.eos = {int(token) for token in np.asarray(request.text_eos[0]) if token >= 0}
        self.turns: list[Turn] = []
        self.prefix: ReadWriteState | None = None
        self.length = 0  # LLM positions in the lane
        self.stream: ResponseStream | None = None
        self.stages: dict[str, float] | None = (
            None  # set it to {} to have the seconds of hearing and prefill measured
        )

    def respond(self, sound) -> Iterator[Reply]:
        """Answer a spoken turn (a file, or samples [N] at 16 kHz). Leaving the loop early is an interruption.

        Raises ValueError for bad audio or a conversation that has become too long.
        """
        if self.stream is not None:
            raise RuntimeError("the last answer is still on its way; interrupt() it first")
        with self.stage("hearing") as settle:
            features = settle(self.hear(sound))
        pieces, prefix = self.admit(features)
        turn = Turn(features, [])
        stream = self.stream = self.engine.submit(
            pieces, self.request, self.voice, prefix, self.length, keep=True
        )
        self.turns.append(turn)
        try:
            with self.stage("prefill") as settle:
                self.engine.admit()
                settle(self.engine.state)
            yield from replies(stream, self.tokenizer, turn.answer)
        finally:
            if (
                self.stream is stream
            ):  # else it was interrupted before, and another answer may be on its way
                self.interrupt()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable]:
        """Times a block where times are wanted; the block passes what it computes through `settle`, which then waits for it."""
        start = time.perf_counter()
        yield jax.block_until_ready if self.stages is not None else lambda value: value
        if self.stages is not None:
            self.stages[name] = time.perf_counter() - start

    def interrupt(self) -> None:
        """Stop the answer at once. What was handed out stays in the history; the user's next turn follows it."""
        if self.stream is None:
            return
        stream, self.stream = self.stream, None
        if stream.chunks or not stream.done:
            stream.cancel()
        if stream.error:  # nothing of a failed answer is worth keeping: the next turn starts from the turns before it
            self.turns.pop()
        self.prefix, self.length = stream.prefix, stream.heard if stream.prefix is not None else 0

    def admit(self, features: list[jax.Array]) -> tuple[list[PromptPiece], ReadWriteState | None]:
        """The prompt of a new turn: behind the lane if it fits, else (overflow "drop") from scratch behind the newest turns that fit."""
        room, size, past = (
            self.engine.engine_config.llm_capacity - int(self.request.max_text[0]),
            self.engine.engine_config.prefill_size,
            self.turns,
        )
        if self.prefix is not None:
            ids = self.tokenizer.continuation(len(features), self.ended(past[-1]))
            if self.length + len(ids) <= room:
                return split(ids, features, size), self.prefix
        droppable = len(past) if self.overflow == "drop" else 0
        for dropped in range(droppable + 1):
            turns = past[dropped:]
            ids = self.dialogue(turns, len(features))
            if len(ids) <= room:
                self.turns, self.prefix, self.length = turns, None, 0
                return split(
                    ids, [f for turn in turns for f in turn.features] + features, size
                ), None
        raise ValueError(
            f"the conversation takes {len(ids)} positions and {self.engine.engine_config.llm_capacity - room} more for the answer, "
            f"but there are {self.engine.engine_config.llm_capacity}; start a new one, or let the oldest turns be dropped"
        )

    def ended(self, turn: Turn) -> bool:
        """Whether an answer holds its end token (it does not when it was cut short)."""
        return bool(turn.answer) and turn.answer[-1] in self.eos

    def dialogue(self, turns: list[Turn], clips: int) -> list[int]:
        """The prompt of a whole conversation with the answers that were given, token for token, up to the next answer."""
        if not turns:
            return self.tokenizer.prompt([clips])
        ids = self.tokenizer.prompt([len(turns[0].features)])
        spoken = [len(turn.features) for turn in turns[1:]] + [clips]
        for turn, following in zip(turns, spoken, strict=True):
            ids += [*turn.answer, *self.tokenizer.continuation(following, self.ended(turn))]
        return ids


def replies(stream: ResponseStream, tokenizer: Tokenizer, answer: list[int]) -> Iterator[Reply]:
    """A stream's chunks as replies; the text tokens are also appended to `answer`. A character is given out once it is whole."""
    told, units = "", tokenizer.config.units
    for chunk in stream:
        answer += chunk.tokens
        text = tokenizer.decode(answer)
        whole = text if stream.done and not stream.chunks else text.rstrip("\ufffd")
        fresh, told = whole[len(told) :], max(told, whole, key=len)
        unit_text = tokenizer.unit_text(chunk.speech)
        yield Reply(fresh, parse_units(unit_text, units), unit_text, chunk.samples)


def split(ids: Sequence[int], features: Sequence[jax.Array], size: int) -> list[PromptPiece]:
    """A prompt as pieces of at most `size` positions, each with the features of at most one 30 s clip, in order."""
    ids = np.asarray(ids, np.int32)
    speech, positions = ids == SPEECH, features[0].shape[0]
    count = np.cumsum(speech)  # features used up to and with each position
    if count[-1] != positions * len(features):
        raise ValueError(
            f"the prompt has {count[-1]} speech positions, but {len(features)} clips of {positions} were given"
        )
    starts = np.searchsorted(
        count, np.arange(1, len(features)) * positions + 1
    )  # where every clip but the first begins
    edges = [0, *starts, len(ids)]
    pieces = []
    for clip, (begin, end) in enumerate(itertools.pairwise(edges)):
        for start in range(begin, end, size):
            pieces.append(
                PromptPiece(
                    ids[start : min(start + size, end)],
                    features[clip],
                    int(speech[begin:start].sum()),
                )
            )
    return pieces

"""Continuous batching: a queue of requests, the slots of a batch, and one compiled step for all.

Requests join and leave between two steps; this compiles nothing and does not change the answers of
other requests. Step n + 1 is dispatched before the output of step n is fetched, so that the device
does not wait for the host.
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax import sharding
from omni2_jax.config import Omni2Config
from omni2_jax.generate import streaming_step
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import FAILED, IDLE, ReadWriteState, Request
from omni2_jax.generate.streaming_step import DecodeState, StepOutput
from omni2_jax.models.model import language_dtype


class QueueFullError(RuntimeError):
    """The engine's queue is full."""


class GenerationError(RuntimeError):
    """The numbers of an answer were not finite; the answer was stopped."""


@dataclass(frozen=True)
class PromptPiece:
    """Consecutive prompt tokens, with the features of at most one segment."""

    ids: np.ndarray  # [P] at most EngineConfig.prefill_size
    features: jax.Array  # [F, D] of the segment
    first: int  # how many of these features earlier pieces of the prompt use


@dataclass(eq=False)
class ResponseStream:
    """An answer that is being generated.

    Iterating over it runs the engine's steps, and so generates the answers of all other requests as
    well. It raises GenerationError, after the last output, if the answer was stopped.
    """

    engine: "Engine"
    pieces: Sequence[PromptPiece]
    request: Request
    voice: jax.Array | None
    # The conversation before the turn; at the end, if `keep_prefix`, with prompt and answer.
    prefix: ReadWriteState | None
    keep_prefix: bool
    # LLM positions of the conversation, up to the last output that was delivered.
    num_delivered: int
    slot: int | None = None
    outputs: collections.deque[StepOutput] = field(default_factory=collections.deque)
    done: bool = False
    error: Exception | None = None
    num_prefilled: int = 0  # pieces that the prefix has

    def __iter__(self) -> Iterator[StepOutput]:
        while (output := self.engine.next_output(self)) is not None:
            yield output
        if self.error:
            raise self.error

    def cancel(self) -> None:
        """Stop now. Outputs that were delivered stay in the prefix, all others are dropped."""
        self.engine.cancel(self)


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an engine.

    The shardings of their outputs equal those of their inputs, so that no call after the first
    one compiles anything.
    """

    empty_prefix: Callable  # () -> prefix, a conversation without a turn
    empty_state: Callable  # (params) -> state, all slots idle
    prefill: Callable  # (params, prefix, piece's arguments as keywords) -> prefix; donates prefix
    insert: Callable  # (params, state, prefix, slot, voice) -> state; donates state
    step: Callable  # (params, state) -> (state, packed step output); donates state
    free: Callable  # (state, slot, length) -> (state, prefix); donates state

    @classmethod
    def of(
        cls,
        config: Omni2Config,
        graph: nnx.GraphDef,
        params: dict,
        engine_config: EngineConfig,
    ) -> "Programs":
        """The programs for parameters on a mesh, which may be abstract (jax.ShapeDtypeStruct)."""
        dtype, mesh = language_dtype(params), sharding.mesh_of(params)
        listed = nnx.merge(graph, params).form.listed_caches

        def empty_prefix() -> ReadWriteState:
            capacities = engine_config.llm_capacity, engine_config.speech_capacity
            return ReadWriteState.empty(config, 1, *capacities, dtype, listed)

        def empty_state(params: dict) -> DecodeState:
            return DecodeState.empty(nnx.merge(graph, params), engine_config, dtype)

        def prefill(params: dict, prefix: ReadWriteState, **piece) -> ReadWriteState:
            return streaming_step.prefill(nnx.merge(graph, params), prefix, **piece)

        def insert(params: dict, state: DecodeState, *arguments) -> DecodeState:
            return streaming_step.insert(nnx.merge(graph, params), state, *arguments)

        def step(params: dict, state: DecodeState) -> tuple[DecodeState, jax.Array]:
            return streaming_step.read_write_step(nnx.merge(graph, params), engine_config, state)

        def jit(function: Callable, **options) -> Callable:
            return jax.jit(sharding.within(mesh, function), **options)

        prefix_sharding = sharding.of_state(jax.eval_shape(empty_prefix), mesh)
        state_sharding = sharding.of_state(jax.eval_shape(empty_state, params), mesh)
        return cls(
            empty_prefix=jit(empty_prefix, out_shardings=prefix_sharding),
            empty_state=jit(empty_state, out_shardings=state_sharding),
            prefill=jit(prefill, donate_argnums=1, out_shardings=prefix_sharding),
            insert=jit(insert, donate_argnums=1, out_shardings=state_sharding),
            step=jit(
                step,
                donate_argnums=1,
                out_shardings=(state_sharding, sharding.replicated(mesh)),
            ),
            free=jit(
                streaming_step.free,
                donate_argnums=0,
                out_shardings=(state_sharding, prefix_sharding),
            ),
        )


class Engine:
    """Answers requests: `submit` a turn and iterate over its stream.

    Threads may share an engine: one lock guards all of its methods.
    """

    def __init__(
        self,
        config: Omni2Config,
        graph: nnx.GraphDef,
        params: dict,
        engine_config: EngineConfig,
        queue: int = 64,
    ):
        """queue: how many requests may wait for a slot."""
        self.config, self.params = config, params
        self.engine_config, self.queue = engine_config, queue
        self.dtype = language_dtype(params)
        self.feature_sharding = sharding.replicated(sharding.mesh_of(params))
        self.programs = Programs.of(config, graph, params, engine_config)
        self.state = self.programs.empty_state(params)
        self.slots: list[ResponseStream | None] = [None] * engine_config.slots
        self.waiting: collections.deque[ResponseStream] = collections.deque()
        # Packed outputs of the steps that were not fetched yet, and the streams of their slots.
        self.dispatched: collections.deque[tuple[jax.Array, list[ResponseStream | None]]] = (
            collections.deque()
        )
        self.lock = threading.RLock()

    @property
    def is_idle(self) -> bool:
        """Whether no slot speaks."""
        return not any(self.slots)

    def warm_up(self) -> None:
        """Compile all programs, so that no conversation has to wait for it."""
        config = self.config
        ids = np.zeros(self.engine_config.prefill_size, np.int32)
        positions = config.speech_positions
        features = jnp.zeros((positions, config.llm.width), self.dtype)
        voice = jnp.ones(config.flow.speaker) if config.flow else None
        request = Request.of(config, Options(max_new_tokens=1, max_flush_units=1))
        for _ in self.submit([PromptPiece(ids, features, 0)], request, voice, keep_prefix=True):
            pass

    def compilations(self) -> int:
        """How many times the programs were compiled so far."""
        return sum(
            getattr(self.programs, field.name)._cache_size()
            for field in dataclasses.fields(self.programs)
        )

    def submit(
        self,
        pieces: Sequence[PromptPiece],
        request: Request,
        voice: jax.Array | None,
        prefix: ReadWriteState | None = None,
        length: int = 0,
        keep_prefix: bool = False,
    ) -> ResponseStream:
        """Queue a turn.

        pieces: the prompt of the turn. voice: x-vector [192]; None without a decoder.
        prefix: the conversation before the turn, which has `length` LLM positions; it is donated.
        keep_prefix: whether the stream gets the prefix back at its end, with prompt and answer.
        Raises QueueFullError, and ValueError for a turn that does not fit the engine's buffers.
        """
        with self.lock:
            if len(self.waiting) >= self.queue:
                raise QueueFullError(
                    f"{len(self.waiting)} requests are waiting for one of the "
                    f"{self.engine_config.slots} slots, and no more than {self.queue} may wait; "
                    "try again later"
                )
            sizes, limit = [len(piece.ids) for piece in pieces], self.engine_config.prefill_size
            if not sizes or not 0 < min(sizes) <= max(sizes) <= limit:
                raise ValueError(
                    f"the pieces of a prompt have 1 to {limit} positions; these have {sizes}"
                )
            length += sum(sizes)
            max_text, max_flush = int(request.max_text[0]), int(request.max_flush[0])
            self.engine_config.check(self.config, length, max_text, max_flush)
            stream = ResponseStream(self, pieces, request, voice, prefix, keep_prefix, length)
            self.waiting.append(stream)
            return stream

    def next_output(self, stream: ResponseStream) -> StepOutput | None:
        """Run steps until a stream has an output -> that output, or None after the last one."""
        with self.lock:
            while not stream.outputs and not stream.done:
                self.step()
            if not stream.outputs:
                return None
            output = stream.outputs.popleft()
            stream.num_delivered = output.llm_length
            return output

    def step(self, pieces: float = math.inf) -> None:
        """Admit queued requests, dispatch a step if a slot is active, fetch the output before.

        pieces: how many pieces of newcomers' prompts may be computed while others speak, whose
        speech would have gaps if they waited for all of a long one.
        """
        with self.lock:
            self.admit(math.inf if self.is_idle else pieces)
            if not self.is_idle:
                self.state, packed = self.programs.step(self.params, self.state)
                packed.copy_to_host_async()
                self.dispatched.append((packed, list(self.slots)))
            if len(self.dispatched) > 1 or self.is_idle:
                self.fetch()

    def admit(self, pieces: float = math.inf) -> None:
        """Start queued requests in free slots.

        pieces: how many pieces of their prompts may be computed. A request whose prompt is not
        whole then stays the first in the queue, and goes on in the next call.
        If a request cannot be started, its stream ends with the error; the others are not affected.
        """
        with self.lock:
            for slot in range(self.engine_config.slots):
                while self.slots[slot] is None and self.waiting:
                    stream = self.waiting[0]
                    pieces += stream.num_prefilled
                    if not self.start(stream, slot, pieces):
                        return
                    pieces -= stream.num_prefilled

    def start(self, stream: ResponseStream, slot: int, pieces: float) -> bool:
        """Compute a stream's prompt, and put it into the slot when it is whole.

        pieces: how many pieces of the prompt there may be after this call, earlier ones included.
        Returns False if the stream has to wait for more of them. An error ends the stream.
        """
        try:
            prefix = self.prefill(stream, pieces)
            if stream.num_prefilled < len(stream.pieces):
                stream.prefix = prefix
                return False
            self.state = self.programs.insert(
                self.params, self.state, prefix, np.int32(slot), stream.voice
            )
            self.slots[slot], stream.slot = stream, slot
        except Exception as error:
            stream.error, stream.done = error, True
        except BaseException:  # Ctrl-C
            stream.error = GenerationError("interrupted while the prompt was computed")
            stream.done = True
            self.waiting.popleft()
            raise
        self.waiting.popleft()
        return True

    def prefill(self, stream: ResponseStream, pieces: float) -> ReadWriteState:
        """The prefix of a stream with the first `pieces` pieces of its prompt."""
        prefix, stream.prefix = stream.prefix, None  # donated: it must not be used again
        prefix = self.programs.empty_prefix() if prefix is None else prefix
        while stream.num_prefilled < min(pieces, len(stream.pieces)):
            piece = stream.pieces[stream.num_prefilled]
            stream.num_prefilled += 1
            padding = self.engine_config.prefill_size - len(piece.ids)
            prefix = self.programs.prefill(
                self.params,
                prefix,
                ids=np.pad(piece.ids, (0, padding)),
                length=np.int32(len(piece.ids)),
                features=jax.device_put(piece.features, self.feature_sharding),
                first=np.int32(piece.first),
                request=stream.request,
            )
        return prefix

    def fetch(self) -> None:
        """Fetch the output of the oldest dispatched step and give it to the streams."""
        with self.lock:
            if not self.dispatched:
                return
            packed, streams = self.dispatched.popleft()
            rows = np.asarray(packed)
            for slot, stream in enumerate(streams):
                if stream is not None and not stream.done:
                    self.give(stream, StepOutput.of(rows[slot], self.config))

    def give(self, stream: ResponseStream, output: StepOutput) -> None:
        """Append an output to its stream; free the slot if this was the last one."""
        stream.error = failure(stream, output)
        if not np.isfinite(output.samples).all():
            output = dataclasses.replace(output, samples=output.samples[:0])
        stream.outputs.append(output)
        if stream.error or output.phase == IDLE:
            self.free(stream, output.llm_length)

    def free(self, stream: ResponseStream, length: int) -> None:
        """Free the slot of a stream, keeping `length` LLM positions of its prefix."""
        assert stream.slot is not None
        stream.done = True
        self.slots[stream.slot] = None
        self.state, prefix = self.programs.free(self.state, np.int32(stream.slot), np.int32(length))
        stream.prefix = prefix if stream.keep_prefix and not stream.error else None
        stream.pieces = ()  # a segment's features take megabytes, and the stream may live for long

    def cancel(self, stream: ResponseStream) -> None:
        """End a stream, whether it waits, is in a slot, or is done but not delivered to its end."""
        with self.lock:
            stream.outputs.clear()
            if stream.slot is None:
                if stream in self.waiting:
                    self.waiting.remove(stream)
                    self.take_back_prompt(stream)
            elif not stream.done:
                self.free(stream, stream.num_delivered)
            elif stream.prefix is not None:
                stream.prefix = shortened(stream.prefix, stream.num_delivered)
            stream.done = True

    def take_back_prompt(self, stream: ResponseStream) -> None:
        """Give a stream that has waited the prefix that it came with; None if it had none."""
        stream.num_delivered -= sum(len(piece.ids) for piece in stream.pieces)
        if not stream.num_delivered:
            stream.prefix = None
        elif stream.prefix is not None:
            stream.prefix = shortened(stream.prefix, stream.num_delivered)


def shortened(prefix: ReadWriteState, length: int) -> ReadWriteState:
    """The first `length` LLM positions of a prefix."""
    # Placed as the programs place it: otherwise `prefill` would be compiled once more.
    placement = prefix.llm_length.sharding
    new_length = jax.device_put(np.array([length], np.int32), placement)
    return dataclasses.replace(prefix, llm_length=new_length)


def failure(stream: ResponseStream, output: StepOutput) -> GenerationError | None:
    """The error of an output that is not finite, with its cause as far as it can be known."""
    if output.phase != FAILED and np.isfinite(output.samples).all():
        return None
    segments = {id(piece.features): piece.features for piece in stream.pieces}.values()
    for number, features in enumerate(segments, 1):
        if not np.isfinite(np.asarray(features, np.float32)).all():
            return GenerationError(
                f"the answer was stopped: the speech features of segment {number} of "
                f"{len(segments)} are not finite (NaN or infinite); the checkpoint's speech "
                "encoder or adapter is at fault (parameters or config.json)"
            )
    part = "llm, fusion or speech_lm" if output.phase == FAILED else "flow or vocoder"
    return GenerationError(
        "the answer was stopped: the model's numbers were not finite (NaN or infinite), while the "
        f"speech features were; the checkpoint's {part} is at fault (parameters or config.json)"
    )

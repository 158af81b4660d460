"""Many speakers at once: slots, an admission queue and continuous batching over one compiled streaming step.

Requests join and leave between steps without a new compilation and without changing anybody else's answer. Step n + 1 is
dispatched before step n is read back, so the device never waits for the host.
"""

import collections
import dataclasses
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
from omni2_jax.generate.read_write import FAILED, IDLE, ReadWriteState, Request, request
from omni2_jax.generate.streaming_step import DecodeState, StepOutput
from omni2_jax.models.model import language_dtype


class QueueFullError(RuntimeError):
    """The engine has no room for another request."""


class GenerationError(RuntimeError):
    """A slot's numbers were not finite; its answer ends here."""


@dataclass(frozen=True)
class PromptPiece:
    """A stretch of a prompt with the features of at most one spoken turn."""

    ids: np.ndarray  # [P] at most Shape.prompt
    features: jax.Array  # [F, D] of that turn
    first: int  # how many of its features earlier pieces used


@dataclass(eq=False)
class ResponseStream:
    """An answer on its way. Iterating over it drives the engine; `cancel` ends it at once."""

    engine: "Engine"
    pieces: Sequence[PromptPiece]
    request: Request
    voice: jax.Array | None
    prefix: ReadWriteState | None  # the conversation so far; after the end, with this answer in it
    keep: bool  # whether the lane is wanted back
    heard: int  # LLM positions of the conversation up to what has been handed out
    slot: int | None = None
    chunks: collections.deque = field(default_factory=collections.deque)
    done: bool = False
    error: Exception | None = None

    def __iter__(self) -> Iterator[StepOutput]:
        while self.chunks or not self.done:
            if not self.chunks:
                self.engine.step()
                continue
            chunk = self.chunks.popleft()
            self.heard = chunk.llm_length
            yield chunk
        if self.error:
            raise self.error

    def cancel(self) -> None:
        """Stop now. What was handed out stays in the conversation's lane, the rest is forgotten."""
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

        def empty_prefix() -> ReadWriteState:
            return ReadWriteState.empty(
                config, 1, engine_config.llm_capacity, engine_config.speech_capacity, dtype
            )

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
    """`submit` a turn, iterate over its stream."""

    def __init__(
        self,
        config: Omni2Config,
        graph: nnx.GraphDef,
        params: dict,
        engine_config: EngineConfig,
        queue: int = 64,
    ):
        self.config, self.params = config, params
        self.engine_config, self.queue = engine_config, queue
        self.dtype = language_dtype(params)
        self.home = sharding.replicated(sharding.mesh_of(params))
        self.programs = Programs.of(config, graph, params, engine_config)
        self.state = self.programs.empty_state(params)
        self.slots: list[ResponseStream | None] = [None] * engine_config.slots
        self.waiting: collections.deque[ResponseStream] = collections.deque()
        self.dispatched: collections.deque[tuple[jax.Array, list[ResponseStream | None]]] = (
            collections.deque()
        )

    def warm_up(self) -> None:
        """Compile everything there is to compile, so that no conversation has to wait for it."""
        width = self.config.llm.width
        ids = np.zeros(self.engine_config.prefill_size, np.int32)
        features = jnp.zeros((self.config.speech_positions, width), self.dtype)
        voice = jnp.ones(self.config.flow.speaker) if self.config.flow else None
        asked = request(self.config, max_text=1, max_flush=1)
        for _ in self.submit([PromptPiece(ids, features, 0)], asked, voice, keep=True):
            pass

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(
            getattr(self.programs, field.name)._cache_size()
            for field in dataclasses.fields(self.programs)
        )

    def submit(
        self,
        pieces: Sequence[PromptPiece],
        asked: Request,
        voice: jax.Array | None,
        prefix: ReadWriteState | None = None,
        length: int = 0,
        keep: bool = False,
    ) -> ResponseStream:
        """Queue a turn: its prompt, behind the `length` positions of a conversation's lane.

        Raises QueueFullError, and ValueError for a turn that does not fit the engine's shape.
        """
        if len(self.waiting) >= self.queue:
            raise QueueFullError(
                f"all {self.engine_config.slots} slots are taken and {self.queue} requests wait; try again later"
            )
        sizes = [len(piece.ids) for piece in pieces]
        if not sizes or not 0 < min(sizes) <= max(sizes) <= self.engine_config.prefill_size:
            raise ValueError(
                f"a prompt comes in pieces of 1 to {self.engine_config.prefill_size} positions; these have {sizes}"
            )
        length += sum(sizes)
        self.engine_config.check(
            self.config, length, int(asked.max_text[0]), int(asked.max_flush[0])
        )
        stream = ResponseStream(self, pieces, asked, voice, prefix, keep, length)
        self.waiting.append(stream)
        return stream

    def step(self) -> None:
        """Admit who waits, dispatch a step if anybody speaks, and read back the step before it."""
        self.admit()
        if any(self.slots):
            self.state, packed = self.programs.step(self.params, self.state)
            packed.copy_to_host_async()
            self.dispatched.append((packed, list(self.slots)))
        if len(self.dispatched) > 1 or not any(self.slots):
            self.read_back()

    def admit(self) -> None:
        """Give free slots to those who wait. A turn that cannot be started ends with its error, the others do not notice."""
        for slot in range(self.engine_config.slots):
            while self.slots[slot] is None and self.waiting:
                stream = self.waiting.popleft()
                try:
                    prefix = self.start(stream)
                except Exception as error:
                    stream.error, stream.done = error, True
                    continue
                self.state = self.programs.insert(
                    self.params, self.state, prefix, np.int32(slot), stream.voice
                )
                self.slots[slot], stream.slot = stream, slot

    def start(self, stream: ResponseStream) -> ReadWriteState:
        """A stream's lane with its prompt in it."""
        prefix, stream.prefix = stream.prefix, None  # donated: from here on it is nobody's
        prefix = self.programs.empty_prefix() if prefix is None else prefix
        for piece in stream.pieces:
            ids = np.pad(piece.ids, (0, self.engine_config.prefill_size - len(piece.ids)))
            features = jax.device_put(piece.features, self.home)
            prefix = self.programs.prefill(
                self.params,
                prefix,
                ids=ids,
                length=np.int32(len(piece.ids)),
                features=features,
                first=np.int32(piece.first),
                request=stream.request,
            )
        return prefix

    def read_back(self) -> None:
        """Hand the oldest dispatched step to its streams."""
        if not self.dispatched:
            return
        packed, streams = self.dispatched.popleft()
        rows = np.asarray(packed)
        for slot, stream in enumerate(streams):
            if stream is None or stream.done:
                continue
            chunk = StepOutput.of(rows[slot], self.config)
            stream.chunks.append(chunk)
            if chunk.phase in (IDLE, FAILED):
                if chunk.phase == FAILED:
                    stream.error = GenerationError(
                        "the model's numbers were not finite (NaN or infinite); the answer was stopped"
                    )
                self.free(stream, chunk.llm_length)

    def free(self, stream: ResponseStream, heard: int) -> None:
        """Take a stream out of its slot; the lane goes back to it if it wants it."""
        stream.done = True
        self.slots[stream.slot] = None
        self.state, prefix = self.programs.free(self.state, np.int32(stream.slot), np.int32(heard))
        stream.prefix = prefix if stream.keep and not stream.error else None

    def cancel(self, stream: ResponseStream) -> None:
        """End a stream wherever it is: waiting, in a slot, or over but not yet heard to its end."""
        stream.chunks.clear()
        if stream.slot is None:
            if stream in self.waiting:
                self.waiting.remove(stream)
            stream.prefix = None  # it lacks this turn, which its conversation goes on from
        elif not stream.done:
            self.free(stream, stream.heard)
        elif stream.prefix is not None:
            stream.prefix = dataclasses.replace(
                stream.prefix, llm_length=jnp.array([stream.heard], jnp.int32)
            )
        stream.done = True

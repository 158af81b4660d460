"""The streaming step: in one compiled call for all slots, R text tokens, their fusion, W units, the mel they complete, the samples.

Four verbs over (params, state): `prefill` a lane (the language side's state of one slot) with a turn, `insert` it into a slot,
`read_write_step` until the turn is over, `release` the lane again. Nothing is ever recomputed from the start.
B slots, R/W tokens a step, M mel bins, S samples a step at most.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax import readwrite
from omni2_jax.config import Omni2Config
from omni2_jax.flow.context import Chunks
from omni2_jax.flow.streaming import FlowState, Plan, flow_step
from omni2_jax.hift import draw
from omni2_jax.model import Model
from omni2_jax.readwrite import FLUSHING, IDLE, READING, Burst, ReadWriteState, Request
from omni2_jax.vocoder_stream import VocoderState, vocoder_step

Array = jax.Array


@dataclass(frozen=True)
class Shape:
    """What is compiled in: capacities and rules that no request can change."""

    slots: int = 1
    prompt: int = 384  # prompt positions taken in one piece
    llm: int = 2048  # LLM positions a conversation may take
    speech: int = 2560  # speech-LM positions an answer may take
    units: int = 1536  # units an answer may have, where the flow sees all of its past
    chunk: int | None = None  # units that see one another in the flow; None = the checkpoint's
    left_chunks: int | None = None  # chunks that the flow sees before its own; None = all
    memory: str = "float32"  # dtype of what the flow remembers, most of a slot's bytes; bfloat16 halves them, close to the same mel
    units_only: bool = True
    seamless: bool = True  # join the pieces of the waveform without the small jumps that the released code makes

    def __post_init__(self):
        if self.memory not in ("float32", "bfloat16"):
            raise ValueError(f"Shape.memory is {self.memory!r}, expected float32 or bfloat16")

    def check(self, config: Omni2Config, prompt: int, text: int, flush: int) -> None:
        """Raise ValueError unless there is room for an answer of at most `text` tokens and `flush` units behind a prompt."""
        units, speech = longest(config, text, flush)
        needs = {"llm": prompt + text, "speech": speech} | ({"units": units} if config.flow and self.left_chunks is None else {})
        for name, size in needs.items():
            if size > getattr(self, name):
                raise ValueError(f"prompt and answer may take {size} positions of Shape.{name}, which has {getattr(self, name)}")


def longest(config: Omni2Config, text: int, flush: int) -> tuple[int, int]:
    """The most units, and positions of the speech LM, that `text` tokens make with at most `flush` units after the last one."""
    units = config.write * -(-text // config.read) + flush
    return units, text + 1 + units


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamState:
    """All that lies between two steps; donated to the next one. Without a decoder, flow and vocoder are None."""

    words: ReadWriteState
    flow: FlowState | None
    vocoder: VocoderState | None
    steps: Array  # [B] steps of this turn so far: what the vocoder's draws are folded with

    @classmethod
    def empty(cls, model: Model, shape: Shape, slots: int, dtype=jnp.float32) -> "StreamState":
        """`slots` idle slots; the language side's caches in `dtype`."""
        words = ReadWriteState.empty(model.config, slots, shape.llm, shape.speech, dtype)
        if model.flow is None:
            return cls(words, None, None, jnp.zeros(slots, jnp.int32))
        config = model.config
        flow = FlowState.empty(model.flow, jnp.zeros((slots, config.flow.mels)), plan_of(config, shape), jnp.dtype(shape.memory))
        return cls(words, flow, VocoderState.empty(config.hift, slots), jnp.zeros(slots, jnp.int32))


def plan_of(config: Omni2Config, shape: Shape) -> Plan:
    """How the flow cuts what it is given."""
    size = shape.chunk or config.flow.chunk
    # Where a write fills a chunk, it completes one each time if the first is shorter by the look-ahead it has to wait for.
    chunks = Chunks(size, shape.left_chunks, config.flow.lookahead if size == config.write else 0)
    units = shape.units if shape.left_chunks is None else None
    # A ladder of sizes saves work for one speaker; among many, who are at different places of their chunks, the sizes would add up.
    return Plan.of(config.flow, config.write, chunks, units, ladder=shape.slots == 1)


def prefill(model: Model, lane: ReadWriteState, ids: Array, length: Array, features: Array, first: Array, asked: Request) -> ReadWriteState:
    """Take a piece of a turn's prompt, ids [P] of which `length` count, into a lane of one slot (see `readwrite.prefill`)."""
    return readwrite.prefill(model, lane, ids[None], length[None], features[None], asked, first)


def insert(model: Model, state: StreamState, lane: ReadWriteState, slot: Array, voice: Array | None) -> StreamState:
    """Put a lane into a slot of the batch, to speak with an x-vector [192] (None without a decoder)."""
    words = state.words.put(lane, slot)
    if model.flow is None:
        return dataclasses.replace(state, words=words)
    here = jnp.arange(state.steps.size) == slot
    flow = state.flow.restart(here, jnp.broadcast_to(model.flow.voice(voice[None]), state.flow.voice.shape))
    return StreamState(words, flow, state.vocoder.restart(here), jnp.where(here, 0, state.steps))


def release(state: StreamState, slot: Array, heard: Array) -> tuple[StreamState, ReadWriteState]:
    """Stop a slot at once -> (state with that slot idle, its lane). `heard`: the LLM positions to keep of its conversation."""
    lane = state.words.take(slot)
    lane = dataclasses.replace(lane, phase=jnp.full_like(lane.phase, IDLE), llm_length=heard[None])
    idle = dataclasses.replace(state.words, phase=state.words.phase.at[slot].set(IDLE))
    return dataclasses.replace(state, words=idle), lane


def read_write_step(model: Model, shape: Shape, state: StreamState) -> tuple[StreamState, Array]:
    """One step of every slot -> (state, packed chunk [B, ...] int32; see `Chunk`)."""
    active = (state.words.phase == READING) | (state.words.phase == FLUSHING)
    words, burst = readwrite.read_write(model, state.words, shape.units_only)
    state = dataclasses.replace(state, words=words)
    if model.flow is None:
        return state, pack(words, burst, *silence(model.config, active.size))
    # A step that finds every slot idle (the one dispatched before the host has seen the end) must not pay for the audio.
    speak = lambda state: speak_step(model, shape, state, burst, active & (words.phase == IDLE))  # noqa: E731
    rest = lambda state: (state, *silence(model.config, active.size))  # noqa: E731
    state, samples, heard = jax.lax.cond(jnp.any(active), speak, rest, state)
    return state, pack(words, burst, samples, heard)


def speak_step(model: Model, shape: Shape, state: StreamState, burst: Burst, final: Array) -> tuple[StreamState, Array, Array]:
    """The burst's units through flow and vocoder -> (state, samples [B, S], how many [B])."""
    units, counts = units_of(model.config, burst.speech)
    flow, mel, frames = flow_step(model.flow, state.flow, units, counts, final)
    keys = jax.vmap(jax.random.fold_in)(state.words.request.key, 2**31 - 1 - state.steps)
    draws = draw(model.config.hift, keys, samples_per_step(model.config))
    vocoder, samples, heard = vocoder_step(model.hift, state.vocoder, mel, frames, final, *draws, shape.seamless)
    return StreamState(state.words, flow, vocoder, state.steps + 1), samples, heard


def samples_per_step(config: Omni2Config) -> int:
    """Samples that a step gives at most: those of W units and of the look-ahead that a last step catches up, and the overlap."""
    frames = config.flow.upsample * (config.write + config.flow.lookahead)
    return (config.hift.overlap + frames) * config.hift.samples_per_frame


def silence(config: Omni2Config, slots: int) -> tuple[Array, Array]:
    return jnp.zeros((slots, samples_per_step(config) if config.flow else 0)), jnp.zeros(slots, jnp.int32)


def units_of(config: Omni2Config, speech: Array) -> tuple[Array, Array]:
    """Speech-LM tokens [B, W] -> their unit ids, moved to the left [B, W], and how many there are [B]."""
    units = speech - config.tokens.sep - 1
    valid = (speech > config.tokens.sep) & (units < config.units)
    order = jnp.argsort(~valid, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(valid, units, 0), order, axis=1), valid.sum(1)


def pack(words: ReadWriteState, burst: Burst, samples: Array, heard: Array) -> Array:
    """Everything the host wants from a step in one array: one copy, not five."""
    numbers = jnp.stack([words.phase, words.llm_length, heard], axis=1)
    bits = jax.lax.bitcast_convert_type(samples.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([numbers, burst.tokens, burst.speech, bits], axis=1)


@dataclass(frozen=True)
class Chunk:
    """A slot's share of a packed step, on the host."""

    phase: int
    llm_length: int
    tokens: list[int]
    speech: list[int]
    samples: np.ndarray  # float32, 24 kHz

    @classmethod
    def of(cls, row: np.ndarray, config: Omni2Config) -> "Chunk":
        phase, length, heard = (int(n) for n in row[:3])
        tokens, speech, bits = np.split(row[3:], [config.read, config.read + config.write])
        keep = lambda ids: [int(i) for i in ids if i >= 0]  # noqa: E731
        return cls(phase, length, keep(tokens), keep(speech), bits[:heard].view(np.float32).copy())

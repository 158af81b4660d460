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

from omni2_jax.config import Omni2Config
from omni2_jax.generate import read_write
from omni2_jax.generate.read_write import (
    FLUSHING,
    IDLE,
    READING,
    ReadWriteOutput,
    ReadWriteState,
    Request,
)
from omni2_jax.models.flow.context import Chunks
from omni2_jax.models.flow.streaming import FlowState, Plan, flow_step
from omni2_jax.models.model import Model
from omni2_jax.models.vocoder.hift import draw
from omni2_jax.models.vocoder.hift_streaming import VocoderState, vocoder_step

Array = jax.Array


@dataclass(frozen=True)
class EngineConfig:
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
    seamless: bool = (
        True  # join the pieces of the waveform without the small jumps that the released code makes
    )

    def __post_init__(self):
        if self.memory not in ("float32", "bfloat16"):
            raise ValueError(f"Shape.memory is {self.memory!r}, expected float32 or bfloat16")

    def check(self, config: Omni2Config, prompt: int, text: int, flush: int) -> None:
        """Raise ValueError unless there is room for an answer of at most `text` tokens and `flush` units behind a prompt."""
        units, speech = longest(config, text, flush)
        needs = {"llm": prompt + text, "speech": speech} | (
            {"units": units} if config.flow and self.left_chunks is None else {}
        )
        for name, size in needs.items():
            if size > getattr(self, name):
                raise ValueError(
                    f"prompt and answer may take {size} positions of Shape.{name}, which has {getattr(self, name)}"
                )


def longest(config: Omni2Config, text: int, flush: int) -> tuple[int, int]:
    """The most units, and positions of the speech LM, that `text` tokens make with at most `flush` units after the last one."""
    units = config.write * -(-text // config.read) + flush
    return units, text + 1 + units


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that lies between two steps; donated to the next one. Without a decoder, flow and vocoder are None."""

    language: ReadWriteState
    flow: FlowState | None
    vocoder: VocoderState | None
    steps: Array  # [B] steps of this turn so far: what the vocoder's draws are folded with

    @classmethod
    def empty(
        cls, model: Model, shape: EngineConfig, slots: int, dtype=jnp.float32
    ) -> "DecodeState":
        """`slots` idle slots; the language side's caches in `dtype`."""
        language = ReadWriteState.empty(model.config, slots, shape.llm, shape.speech, dtype)
        if model.flow is None:
            return cls(language, None, None, jnp.zeros(slots, jnp.int32))
        config = model.config
        flow = FlowState.empty(
            model.flow,
            jnp.zeros((slots, config.flow.mels)),
            plan_of(config, shape),
            jnp.dtype(shape.memory),
        )
        return cls(
            language, flow, VocoderState.empty(config.vocoder, slots), jnp.zeros(slots, jnp.int32)
        )


def plan_of(config: Omni2Config, shape: EngineConfig) -> Plan:
    """How the flow cuts what it is given."""
    size = shape.chunk or config.flow.chunk
    # Where a write fills a chunk, it completes one each time if the first is shorter by the look-ahead it has to wait for.
    chunks = Chunks(size, shape.left_chunks, config.flow.lookahead if size == config.write else 0)
    units = shape.units if shape.left_chunks is None else None
    # A ladder of sizes saves work for one speaker; among many, who are at different places of their chunks, the sizes would add up.
    return Plan.of(config.flow, config.write, chunks, units, ladder=shape.slots == 1)


def prefill(
    model: Model,
    prefix: ReadWriteState,
    ids: Array,
    length: Array,
    features: Array,
    first: Array,
    asked: Request,
) -> ReadWriteState:
    """Take a piece of a turn's prompt, ids [P] of which `length` count, into a lane of one slot (see `readwrite.prefill`)."""
    return read_write.prefill(model, prefix, ids[None], length[None], features[None], asked, first)


def insert(
    model: Model, state: DecodeState, prefix: ReadWriteState, slot: Array, voice: Array | None
) -> DecodeState:
    """Put a lane into a slot of the batch, to speak with an x-vector [192] (None without a decoder)."""
    language = state.language.put(prefix, slot)
    if model.flow is None:
        return dataclasses.replace(state, language=language)
    here = jnp.arange(state.steps.size) == slot
    flow = state.flow.restart(
        here, jnp.broadcast_to(model.flow.voice(voice[None]), state.flow.voice.shape)
    )
    return DecodeState(language, flow, state.vocoder.restart(here), jnp.where(here, 0, state.steps))


def release(state: DecodeState, slot: Array, heard: Array) -> tuple[DecodeState, ReadWriteState]:
    """Stop a slot at once -> (state with that slot idle, its lane). `heard`: the LLM positions to keep of its conversation."""
    prefix = state.language.take(slot)
    prefix = dataclasses.replace(
        prefix, phase=jnp.full_like(prefix.phase, IDLE), llm_length=heard[None]
    )
    idle = dataclasses.replace(state.language, phase=state.language.phase.at[slot].set(IDLE))
    return dataclasses.replace(state, language=idle), prefix


def read_write_step(
    model: Model, shape: EngineConfig, state: DecodeState
) -> tuple[DecodeState, Array]:
    """One step of every slot -> (state, packed chunk [B, ...] int32; see `Chunk`)."""
    active = (state.language.phase == READING) | (state.language.phase == FLUSHING)
    language, burst = read_write.read_write(model, state.language, shape.units_only)
    state = dataclasses.replace(state, language=language)
    if model.flow is None:
        return state, pack(language, burst, *silence(model.config, active.size))
    # A step that finds every slot idle (the one dispatched before the host has seen the end) must not pay for the audio.
    speak = lambda state: speak_step(model, shape, state, burst, active & (language.phase == IDLE))  # noqa: E731
    rest = lambda state: (state, *silence(model.config, active.size))  # noqa: E731
    state, samples, heard = jax.lax.cond(jnp.any(active), speak, rest, state)
    return state, pack(language, burst, samples, heard)


def speak_step(
    model: Model, shape: EngineConfig, state: DecodeState, burst: ReadWriteOutput, final: Array
) -> tuple[DecodeState, Array, Array]:
    """The burst's units through flow and vocoder -> (state, samples [B, S], how many [B])."""
    units, counts = units_of(model.config, burst.speech)
    flow, mel, frames = flow_step(model.flow, state.flow, units, counts, final)
    keys = jax.vmap(jax.random.fold_in)(state.language.request.key, 2**31 - 1 - state.steps)
    draws = draw(model.config.vocoder, keys, samples_per_step(model.config))
    vocoder, samples, heard = vocoder_step(
        model.vocoder, state.vocoder, mel, frames, final, *draws, shape.seamless
    )
    return DecodeState(state.language, flow, vocoder, state.steps + 1), samples, heard


def samples_per_step(config: Omni2Config) -> int:
    """Samples that a step gives at most: those of W units and of the look-ahead that a last step catches up, and the overlap."""
    frames = config.flow.upsample * (config.write + config.flow.lookahead)
    return (config.vocoder.overlap + frames) * config.vocoder.samples_per_frame


def silence(config: Omni2Config, slots: int) -> tuple[Array, Array]:
    return jnp.zeros((slots, samples_per_step(config) if config.flow else 0)), jnp.zeros(
        slots, jnp.int32
    )


def units_of(config: Omni2Config, speech: Array) -> tuple[Array, Array]:
    """Speech-LM tokens [B, W] -> their unit ids, moved to the left [B, W], and how many there are [B]."""
    units = speech - config.tokens.sep - 1
    valid = (speech > config.tokens.sep) & (units < config.units)
    order = jnp.argsort(~valid, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(valid, units, 0), order, axis=1), valid.sum(1)


def pack(language: ReadWriteState, burst: ReadWriteOutput, samples: Array, heard: Array) -> Array:
    """Everything the host wants from a step in one array: one copy, not five."""
    numbers = jnp.stack([language.phase, language.llm_length, heard], axis=1)
    bits = jax.lax.bitcast_convert_type(samples.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([numbers, burst.tokens, burst.speech, bits], axis=1)


@dataclass(frozen=True)
class StepOutput:
    """A slot's share of a packed step, on the host."""

    phase: int
    llm_length: int
    tokens: list[int]
    speech: list[int]
    samples: np.ndarray  # float32, 24 kHz

    @classmethod
    def of(cls, row: np.ndarray, config: Omni2Config) -> "StepOutput":
        phase, length, heard = (int(n) for n in row[:3])
        tokens, speech, bits = np.split(row[3:], [config.read, config.read + config.write])
        keep = lambda ids: [int(i) for i in ids if i >= 0]  # noqa: E731
        return cls(phase, length, keep(tokens), keep(speech), bits[:heard].view(np.float32).copy())

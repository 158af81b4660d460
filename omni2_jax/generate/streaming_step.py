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
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.read_write import (
    FLUSHING,
    IDLE,
    READING,
    ReadWriteOutput,
    ReadWriteState,
    Request,
)
from omni2_jax.models.flow.mask import Chunks
from omni2_jax.models.flow.streaming import FlowState, StreamPlan, flow_step
from omni2_jax.models.model import Model
from omni2_jax.models.vocoder.hift import draw
from omni2_jax.models.vocoder.hift_streaming import VocoderState, vocoder_step

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that lies between two steps; donated to the next one. Without a decoder, flow and vocoder are None."""

    language: ReadWriteState
    flow: FlowState | None
    vocoder: VocoderState | None
    steps: Array  # [B] steps of this turn so far: what the vocoder's draws are folded with

    @classmethod
    def empty(cls, model: Model, engine_config: EngineConfig, dtype=jnp.float32) -> "DecodeState":
        """All slots idle; the KV caches of the two language models in `dtype`."""
        slots = engine_config.slots
        language = ReadWriteState.empty(
            model.config, slots, engine_config.llm_capacity, engine_config.speech_capacity, dtype
        )
        if model.flow is None:
            return cls(language, None, None, jnp.zeros(slots, jnp.int32))
        config = model.config
        flow = FlowState.empty(
            model.flow,
            jnp.zeros((slots, config.flow.mels)),
            plan_of(config, engine_config),
            jnp.dtype(engine_config.flow_cache_dtype),
        )
        return cls(
            language, flow, VocoderState.empty(config.vocoder, slots), jnp.zeros(slots, jnp.int32)
        )


def plan_of(config: Omni2Config, engine_config: EngineConfig) -> StreamPlan:
    """The static sizes of the flow's streams."""
    size, left_chunks = (
        engine_config.flow_chunk or config.flow.chunk,
        engine_config.flow_left_chunks,
    )
    # If one write is one chunk, the first chunk is shorter by the look-ahead; then every later
    # write completes exactly one chunk.
    chunks = Chunks(size, left_chunks, config.flow.lookahead if size == config.write else 0)
    units = engine_config.max_units if left_chunks is None else None
    # One slot uses the smallest window that fits. Many slots are at different offsets in their
    # chunks, so nearly every size would run in every step: one or two are cheaper.
    bucketed = engine_config.slots == 1
    return StreamPlan.of(config.flow, config.write, chunks, units, bucketed)


def prefill(
    model: Model,
    prefix: ReadWriteState,
    *,
    ids: Array,
    length: Array,
    features: Array,
    first: Array,
    request: Request,
) -> ReadWriteState:
    """Append one piece of a prompt to a prefix, a state with batch size 1.

    ids: [P], of which the first `length` count. features: [F, D]. See `read_write.prefill`.
    """
    return read_write.prefill(
        model,
        prefix,
        ids=ids[None],
        lengths=length[None],
        features=features[None],
        first=first,
        request=request,
    )


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


def free(state: DecodeState, slot: Array, length: Array) -> tuple[DecodeState, ReadWriteState]:
    """Stop a slot -> (state with that slot idle, the slot's prefix).

    length: how many LLM positions of its conversation the prefix keeps.
    """
    prefix = state.language.take(slot)
    prefix = dataclasses.replace(
        prefix, phase=jnp.full_like(prefix.phase, IDLE), llm_length=length[None]
    )
    idle = dataclasses.replace(state.language, phase=state.language.phase.at[slot].set(IDLE))
    return dataclasses.replace(state, language=idle), prefix


def read_write_step(
    model: Model, engine_config: EngineConfig, state: DecodeState
) -> tuple[DecodeState, Array]:
    """One step of every slot -> (state, packed chunk [B, ...] int32; see `Chunk`)."""
    active = (state.language.phase == READING) | (state.language.phase == FLUSHING)
    language, burst = read_write.read_write(model, state.language, engine_config.units_only)
    state = dataclasses.replace(state, language=language)
    if model.flow is None:
        return state, pack(language, burst, *silence(model.config, active.size))
    # A step that finds every slot idle (the one dispatched before the host has seen the end) must not pay for the audio.
    speak = lambda state: speak_step(
        model, engine_config, state, burst, active & (language.phase == IDLE)
    )  # noqa: E731
    rest = lambda state: (state, *silence(model.config, active.size))  # noqa: E731
    state, samples, heard = jax.lax.cond(jnp.any(active), speak, rest, state)
    return state, pack(language, burst, samples, heard)


def speak_step(
    model: Model,
    engine_config: EngineConfig,
    state: DecodeState,
    burst: ReadWriteOutput,
    final: Array,
) -> tuple[DecodeState, Array, Array]:
    """The burst's units through flow and vocoder -> (state, samples [B, S], how many [B])."""
    units, counts = units_of(model.config, burst.speech)
    flow, mel, frames = flow_step(model.flow, state.flow, units, counts, final)
    keys = jax.vmap(jax.random.fold_in)(state.language.request.key, 2**31 - 1 - state.steps)
    draws = draw(model.config.vocoder, keys, samples_per_step(model.config))
    vocoder, samples, heard = vocoder_step(
        model.vocoder, state.vocoder, mel, frames, final, *draws, engine_config.seamless
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

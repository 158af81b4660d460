"""One streaming step of all slots, compiled as one call.

It reads R text tokens, fuses them, writes W units, and computes the mel frames that these units
complete and their samples. As in JetStream there are four functions: `prefill` a prompt into a
prefix, `insert` the prefix into a slot, run `read_write_step` until the answer ends, `free` the
slot. No step computes anything of an earlier step again, except the flow's open chunk.

B slots, P prompt tokens of a piece, R text tokens and W speech tokens of a step, F speech features,
D LLM width, S samples of a step at most.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.config import Omni2Config
from omni2_jax.generate import read_write
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.read_write_state import (
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
from omni2_jax.models.vocoder import base as vocoder_base

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of all slots between two steps. Its buffers are donated to a step.

    Without a decoder, flow and vocoder are None.
    """

    language: ReadWriteState
    flow: FlowState | None
    vocoder: vocoder_base.State
    steps: Array  # [B] steps of this answer; folded into the key of the vocoder's noise

    @classmethod
    def empty(
        cls, model: Model, engine_config: EngineConfig, dtype: jnp.dtype | type = jnp.float32
    ) -> "DecodeState":
        """All slots idle; the KV caches of the two language models in `dtype`."""
        config, slots = model.config, engine_config.slots
        language = ReadWriteState.empty(
            config,
            slots,
            engine_config.llm_capacity,
            engine_config.speech_capacity,
            dtype,
            model.form.listed_caches,
        )
        flow = vocoder = None
        if model.flow is not None:
            flow = FlowState.empty(
                model.flow,
                jnp.zeros((slots, config.flow.mels)),
                plan_of(config, engine_config),
                jnp.dtype(engine_config.flow_cache_dtype),
            )
            vocoder = model.vocoder.empty_state(slots)
        return cls(language, flow, vocoder, jnp.zeros(slots, jnp.int32))


def plan_of(config: Omni2Config, engine_config: EngineConfig) -> StreamPlan:
    """The static sizes of the flow's streams."""
    size = engine_config.flow_chunk or config.flow.chunk
    left_chunks = engine_config.flow_left_chunks
    # If one write is one chunk, the first chunk is shorter by the look-ahead, or by what exceeds
    # whole chunks of it; then every later write completes exactly one chunk.
    shift = config.flow.lookahead % size if size == config.write else 0
    chunks = Chunks(size, left_chunks, shift)
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
    """Copy a prefix into a slot of the batch and reset the slot's flow and vocoder.

    voice: x-vector [192] of the voice to speak with; None without a decoder.
    """
    language = state.language.put(prefix, slot)
    if model.flow is None:
        return dataclasses.replace(state, language=language)
    assert state.flow is not None and voice is not None
    is_slot = jnp.arange(state.steps.size) == slot
    voices = jnp.broadcast_to(model.flow.voice(voice[None]), state.flow.voice.shape)
    return DecodeState(
        language=language,
        flow=state.flow.restart(is_slot, voices),
        vocoder=model.vocoder.restart(state.vocoder, is_slot),
        steps=jnp.where(is_slot, 0, state.steps),
    )


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
    """One step of every slot -> (state, packed output [B, ...] int32; see `StepOutput`)."""
    active = (state.language.phase == READING) | (state.language.phase == FLUSHING)
    language, output = read_write.read_write(model, state.language, engine_config.units_only)
    state = dataclasses.replace(state, language=language)
    if model.flow is None:
        return state, pack(language, output, *silence(model.config, active.size))
    final = active & (language.phase == IDLE)

    def speak(_: int, carry: tuple) -> tuple[DecodeState, Array, Array]:
        return speak_step(model, engine_config, carry[0], output, final)

    # The host dispatches one step more before it has read that all slots are idle; this step must
    # not pay for the audio. A loop of one or no iteration updates the flow's cache in place, while
    # a conditional would copy it.
    iterations = jnp.any(active).astype(jnp.int32)
    silent = (state, *silence(model.config, active.size))
    state, samples, counts = jax.lax.fori_loop(0, iterations, speak, silent)
    return state, pack(language, output, samples, counts)


def speak_step(
    model: Model,
    engine_config: EngineConfig,
    state: DecodeState,
    output: ReadWriteOutput,
    final: Array,
) -> tuple[DecodeState, Array, Array]:
    """Flow and vocoder for the units of one write -> (state, samples [B, S], sample counts [B]).

    final: [B], whether these are the last units of the answer.
    """
    assert state.flow is not None
    units, unit_counts = units_of(model.config, output.speech_tokens)
    flow, mel, frames = flow_step(model.flow, state.flow, units, unit_counts, final)
    keys = jax.vmap(jax.random.fold_in)(state.language.request.key, 2**31 - 1 - state.steps)
    with jax.named_scope("vocoder"):
        vocoder, samples, sample_counts = model.vocoder.step(
            state.vocoder, mel, frames, final, keys, engine_config.seamless
        )
    return DecodeState(state.language, flow, vocoder, state.steps + 1), samples, sample_counts


def samples_per_step(config: Omni2Config) -> int:
    """S, the largest number of samples of a step.

    They are those of W units, of the look-ahead units that the last step of an answer adds, and of
    the vocoder's overlap.
    """
    frames = config.flow.upsample * (config.write + config.flow.lookahead)
    return (config.vocoder.overlap + frames) * config.vocoder.samples_per_frame


def silence(config: Omni2Config, slots: int) -> tuple[Array, Array]:
    """Samples [B, S] and their counts [B] of a step without audio: zeros. S is 0 without a flow."""
    size = samples_per_step(config) if config.flow else 0
    return jnp.zeros((slots, size)), jnp.zeros(slots, jnp.int32)


def units_of(config: Omni2Config, speech_tokens: Array) -> tuple[Array, Array]:
    """Speech-LM tokens [B, W] -> unit ids [B, W], moved to the left, and their counts [B]."""
    units = speech_tokens - config.tokens.sep - 1
    valid = (speech_tokens > config.tokens.sep) & (units < config.units)
    order = jnp.argsort(~valid, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(valid, units, 0), order, axis=1), valid.sum(1)


def pack(language: ReadWriteState, output: ReadWriteOutput, samples: Array, counts: Array) -> Array:
    """All outputs of a step as one int32 array [B, 3 + R + W + S], for one copy to the host.

    samples: [B, S], of which the first `counts` [B] count. They are stored as their bits.
    """
    numbers = jnp.stack([language.phase, language.llm_length, counts], axis=1)
    bits = jax.lax.bitcast_convert_type(samples.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([numbers, output.text_tokens, output.speech_tokens, bits], axis=1)


@dataclass(frozen=True)
class StepOutput:
    """The output of one slot in one step, on the host."""

    phase: int
    llm_length: int  # LLM positions of the conversation after this step
    text_tokens: list[int]
    speech_tokens: list[int]
    samples: np.ndarray  # float32 [N], 24 kHz

    @classmethod
    def of(cls, row: np.ndarray, config: Omni2Config) -> "StepOutput":
        """Unpack one row of a packed output (see `pack`)."""
        phase, llm_length, count = (int(number) for number in row[:3])
        text, speech, bits = np.split(row[3:], [config.read, config.read + config.write])
        return cls(
            phase=phase,
            llm_length=llm_length,
            text_tokens=text[text >= 0].tolist(),
            speech_tokens=speech[speech >= 0].tolist(),
            samples=bits[:count].view(np.float32).copy(),
        )

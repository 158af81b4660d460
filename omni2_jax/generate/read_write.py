"""Read R text tokens, then write W speech tokens: the generation rules of LLaMA-Omni2 (paper, 3.3).

`prefill` starts a turn; `read_write` does one read and one write of every slot in one call. Both
are pure functions of (model, state). A slot is reading, flushing (its text has ended, its units
have not) or idle. Idle slots are masked out; they only occupy their row of the batch.

B slots, T prompt time, R text tokens of a read, W speech tokens of a write, F speech features,
D LLM width, V vocabulary of the LLM, U units.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from omni2_jax.generate.read_write_state import (
    FAILED,
    FLUSHING,
    IDLE,
    READING,
    ReadWriteOutput,
    ReadWriteState,
    Request,
)
from omni2_jax.generate.sampling import Sampling, penalize, sample
from omni2_jax.models.decoder import products
from omni2_jax.models.kv_cache import Cache, over_live
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain

Array = jax.Array


def prefill(
    model: Model,
    state: ReadWriteState,
    *,
    ids: Array,
    lengths: Array,
    features: Array,
    first: Array | int = 0,
    request: Request,
) -> ReadWriteState:
    """Append prompt tokens to every slot with lengths > 0 and start a turn there.

    ids: [B, T] prompt tokens, right-padded, with `model.SPEECH` at each speech position. They go
    behind the tokens that the slot's LLM cache holds already. lengths: [B], how many of them count.
    features: [B, F, D] speech features. first: how many of these earlier pieces of the prompt
    have used; a long prompt takes several calls, one for each piece.
    """
    time = jnp.arange(ids.shape[1])[None]
    positions = jnp.where(time < lengths[:, None], state.llm_length[:, None] + time, -1)
    embedded = model.embed_prompt(ids, features, first)

    def run(live: int, carry: tuple[Array, Cache]) -> tuple[Array, Cache | None]:
        return model.llm(embedded, positions, carry[1], live=live)

    # A prompt that is one piece attends to itself, not to the whole cache.
    longest, piece = jnp.max(state.llm_length + lengths), ids.shape[1]
    carry = jnp.zeros_like(embedded), state.llm
    hidden, llm = over_live(state.llm, longest, run, carry, first=piece)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    started = lengths > 0

    def where_started(new: Array | int | bool, old: Array) -> Array:
        return jnp.where(started.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return dataclasses.replace(
        state,
        phase=where_started(READING, state.phase),
        llm=llm,
        llm_length=state.llm_length + lengths,
        hidden=where_started(last.astype(state.hidden.dtype), state.hidden),
        generated_mask=where_started(False, state.generated_mask),
        text_count=where_started(0, state.text_count),
        speech_length=where_started(0, state.speech_length),
        last_speech_token=where_started(-1, state.last_speech_token),
        flush_count=where_started(0, state.flush_count),
        request=jax.tree.map(where_started, request, state.request),
    )


def read_write(
    model: Model, state: ReadWriteState, units_only: bool = True
) -> tuple[ReadWriteState, ReadWriteOutput]:
    """One step of every slot: up to R text tokens, their fusion, up to W speech tokens.

    units_only: only units and the end token can be sampled. Without a speech LM nothing is written,
    and the answer ends with its text.
    """
    state, text_tokens, hiddens, ended = read(model, state)
    if model.speech_lm is None:
        state = dataclasses.replace(state, phase=jnp.where(ended, IDLE, state.phase))
        no_speech = jnp.full((ended.size, model.config.write), -1, jnp.int32)
        return state, ReadWriteOutput(text_tokens, no_speech)
    state, speech_tokens = write(model, state, text_tokens, hiddens, ended, units_only)
    return state, ReadWriteOutput(text_tokens, speech_tokens)


def read(model: Model, state: ReadWriteState) -> tuple[ReadWriteState, Array, Array, Array]:
    """Generate up to R text tokens -> (state, tokens, hiddens, ended).

    tokens: [B, R], -1 = none. hiddens: [B, R, D], the hidden states that produced them.
    ended: [B], whether the text has ended in this read.
    """
    size = model.config.read

    def condition(carry) -> Array:
        i, _, _, _, reading = carry
        return (i < size) & jnp.any(reading)

    @jax.named_scope("text_token")
    def body(live: int, carry):
        i, state, tokens, hiddens, reading = carry
        hiddens = hiddens.at[:, i].set(state.hidden)
        state, token, reading = read_token(model, state, reading, live)
        return i + 1, state, tokens.at[:, i].set(token), hiddens, reading

    reading = state.phase == READING
    tokens = jnp.full((reading.size, size), -1, jnp.int32)
    hiddens = jnp.zeros((reading.size, size, state.hidden.shape[-1]), state.hidden.dtype)

    def run(live: int, carry):
        return jax.lax.while_loop(condition, functools.partial(body, live), carry)

    longest = jnp.max(jnp.where(reading, state.llm_length, 0)) + size
    carry = (jnp.int32(0), state, tokens, hiddens, reading)
    _, state, tokens, hiddens, reading = over_live(state.llm, longest, run, carry)
    ended = (state.phase == READING) & ~reading
    state = dataclasses.replace(state, phase=jnp.where(ended, FLUSHING, state.phase))
    return state, tokens, hiddens, ended


def read_token(
    model: Model, state: ReadWriteState, reading: Array, live: int
) -> tuple[ReadWriteState, Array, Array]:
    """Generate one text token in every slot where `reading` [B] -> (state, token [B], reading).

    live: how many positions of the LLM's cache are read.
    A token that the request forces takes the place of the sampled one; nothing else differs.
    Afterwards `reading` is False where the token ended the text or the logits were not finite.
    """
    request = state.request
    rows = jnp.arange(reading.size)
    logits = model.llm.logits(state.hidden)
    failed = reading & ~jnp.all(jnp.isfinite(logits), axis=-1)
    reading &= ~failed
    logits = penalize(logits, state.generated_mask, request.text.repetition_penalty)
    # Even numbers for text tokens, odd ones for speech tokens: no key is used twice.
    keys = jax.vmap(jax.random.fold_in)(request.key, 2 * state.text_count)
    # Behind the last column, the last one is read: -1, or the token that ended the text.
    forced = request.forced.at[rows, state.text_count].get(mode="clip")
    sampled = sample(logits, request.text, keys, model.form.search_bits)
    token = jnp.where(forced >= 0, forced, sampled)
    token = jnp.where(reading, token, -1)
    count = state.text_count + reading
    is_eos = jnp.any(token[:, None] == request.text_eos, axis=-1)
    # The end token is fed too: it belongs to the history that the next turn continues.
    positions = jnp.where(reading, state.llm_length, -1)
    embedding = model.llm.embed(token).astype(state.hidden.dtype)
    hidden, llm = model.llm(embedding[:, None], positions[:, None], state.llm, live=live)
    state = dataclasses.replace(
        state,
        phase=jnp.where(failed, FAILED, state.phase),
        llm=llm,
        llm_length=state.llm_length + reading,
        hidden=jnp.where(reading[:, None], hidden[:, 0], state.hidden),
        generated_mask=state.generated_mask.at[rows, jnp.maximum(token, 0)].max(reading),
        text_count=count,
    )
    return state, token, reading & ~(is_eos | (count >= request.max_text))


@jax.named_scope("fused_rows")
def write(
    model: Model,
    state: ReadWriteState,
    text_tokens: Array,
    hiddens: Array,
    ended: Array,
    units_only: bool,
) -> tuple[ReadWriteState, Array]:
    """Feed a read to the speech LM and generate up to W speech tokens -> (state, tokens [B, W]).

    text_tokens: [B, R], -1 = none. hiddens: [B, R, D]. ended: [B], whether the text has just ended.
    The speech LM takes its own last token, the fused rows of the text tokens and, where the text
    has ended, <sep>.
    """
    config = model.config
    active = (state.phase == READING) | (state.phase == FLUSHING)
    fused = model.fuse(hiddens, text_tokens)

    def embed(tokens: Array) -> Array:
        return model.speech_lm.embed(tokens).astype(fused.dtype)[:, None]

    sep = jnp.full_like(state.last_speech_token, config.tokens.sep)
    # [B, 1 + R + 1, D]
    rows = jnp.concatenate([embed(state.last_speech_token), fused, embed(sep)], axis=1)
    has_last = (state.last_speech_token >= 0)[:, None]
    valid = jnp.concatenate([has_last, text_tokens >= 0, ended[:, None]], axis=1)
    valid &= active[:, None]
    positions = jnp.where(valid, state.speech_length[:, None] + jnp.cumsum(valid, axis=1) - 1, -1)
    last_row = jnp.argmax(positions, axis=1)

    def run(live: int, carry: tuple[ReadWriteState, Array]) -> tuple[ReadWriteState, Array]:
        state, _ = carry
        hidden, cache = model.speech_lm(rows, positions, state.speech, live=live)
        hidden = jnp.take_along_axis(hidden, last_row[:, None, None], axis=1)[:, 0]
        fed = dataclasses.replace(
            state, speech=cache, speech_length=state.speech_length + valid.sum(1)
        )
        return write_units(model, fed, hidden, active, units_only, live)

    longest = jnp.max(jnp.where(active, state.speech_length, 0)) + rows.shape[1] + config.write
    tokens = jnp.full((active.size, config.write), -1, jnp.int32)
    return over_live(state.speech, longest, run, (state, tokens))


def write_units(
    model: Model,
    state: ReadWriteState,
    hidden: Array,
    active: Array,
    units_only: bool,
    live: int | None = None,
) -> tuple[ReadWriteState, Array]:
    """Generate up to W speech tokens in the slots that are `active` [B] -> (state, tokens [B, W]).

    hidden: [B, D], which the first token is sampled from. The last token is not fed to the speech
    LM here: the next write feeds it before its rows. live: how many positions of its cache are
    read, all by default.
    """
    size = model.config.write
    sample_token = make_sampler(model, units_only)
    flushing = state.phase == FLUSHING

    def append(i, state, hidden, tokens, alive):
        state, token, alive = write_token(model, state, sample_token, hidden, flushing, alive)
        return state, tokens.at[:, i].set(token), alive

    def condition(carry) -> Array:
        i, _, _, alive = carry
        return (i < size) & jnp.any(alive)

    @jax.named_scope("unit")
    def body(carry):
        i, state, tokens, alive = carry
        embedding = model.speech_lm.embed(state.last_speech_token).astype(hidden.dtype)
        positions = jnp.where(alive, state.speech_length, -1)
        inputs = embedding[:, None], positions[:, None]
        y, cache = model.speech_lm(*inputs, state.speech, live=live)
        state = dataclasses.replace(state, speech=cache, speech_length=state.speech_length + alive)
        state, tokens, alive = append(i, state, y[:, 0], tokens, alive)
        return i + 1, state, tokens, alive

    tokens = jnp.full((active.size, size), -1, jnp.int32)
    state, tokens, alive = append(0, state, hidden, tokens, active)
    _, state, tokens, alive = jax.lax.while_loop(condition, body, (1, state, tokens, alive))
    # An end token before the end of the text only ends the write. After it, it ends the turn, as
    # does the limit of the request.
    done = flushing & ~alive & active & (state.phase != FAILED)
    return dataclasses.replace(state, phase=jnp.where(done, IDLE, state.phase)), tokens


Sampler = Callable[[Array, Sampling, Array], Array]  # (hidden [B, D], settings, keys [B]) -> [B]


def write_token(
    model: Model,
    state: ReadWriteState,
    sample_token: Sampler,
    hidden: Array,
    flushing: Array,
    alive: Array,
) -> tuple[ReadWriteState, Array, Array]:
    """Sample one speech token in every slot where `alive` [B] -> (state, token [B], alive).

    hidden: [B, D] of the speech LM. flushing: [B], whether the text ended before this write.
    Afterwards `alive` is False where the token ends the write.
    """
    request = state.request
    keys = jax.vmap(jax.random.fold_in)(request.key, 2 * state.speech_length + 1)
    # The hidden state is finite exactly when its logits are, and has D numbers instead of V.
    failed = alive & ~jnp.all(jnp.isfinite(hidden), axis=-1)
    alive &= ~failed
    token = jnp.where(alive, sample_token(hidden, request.unit, keys), -1)
    flush_count = state.flush_count + (alive & flushing)
    state = dataclasses.replace(
        state,
        phase=jnp.where(failed, FAILED, state.phase),
        last_speech_token=jnp.where(alive, token, state.last_speech_token),
        flush_count=flush_count,
    )
    is_eos = token == model.config.tokens.unit_eos
    return state, token, alive & ~(is_eos | (flushing & (flush_count >= request.max_flush)))


def make_sampler(model: Model, units_only: bool) -> Sampler:
    """The function that samples a speech token from a hidden state.

    With `units_only` its logits are those of the U units and of the end token alone: nothing else
    can be sampled, and 95 % of the head's rows are not read.
    """
    lm, tokens, units = model.speech_lm, model.config.tokens, model.config.units
    bits = model.form.search_bits

    def sample_any(hidden: Array, settings: Sampling, keys: Array) -> Array:
        return sample(lm.logits(hidden), settings, keys, bits)

    first_unit = tokens.sep + 1

    def sample_unit(hidden: Array, settings: Sampling, keys: Array) -> Array:
        logits = products(hidden, head, scale).astype(jnp.float32)
        unit = sample(logits, settings, keys, bits)
        return jnp.where(unit == units, tokens.unit_eos, first_unit + unit)

    if not units_only:
        return sample_any
    # [U + 1, D], gathered here: before the loop over W tokens, not in it.
    head, scale = lm.head_rows(first_unit, units, tokens.unit_eos)
    head = constrain(head, "vocabulary", None)
    return sample_unit

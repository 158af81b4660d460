"""Read R text tokens, write W speech units: the generation rules of LLaMA-Omni2 for many slots in one compiled call.

`prefill` starts a turn, `read_write` does one burst of every slot at once. Both are pure functions of (model, state); a
slot may be reading, flushing (text over, units still coming) or idle, and an idle slot costs nothing but its lane.
B slots, T prompt time, R/W tokens per burst, D LLM width, V vocabulary.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from omni2_jax.config import Omni2Config
from omni2_jax.generate.sampling import Sampling, penalize, sample
from omni2_jax.models.kv_cache import KVCache
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain

Array = jax.Array

IDLE, READING, FLUSHING, FAILED = (
    0,
    1,
    2,
    3,
)  # FAILED: logits were not finite; the slot is as good as idle
MAX_EOS = 8  # text end tokens a request may name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """What a turn asks for, one row per slot."""

    text: Sampling
    unit: Sampling
    text_eos: Array  # [B, MAX_EOS], filled up with -1
    max_text: Array  # [B] text tokens at most
    max_flush: Array  # [B] speech tokens at most after the text has ended
    key: Array  # [B] PRNG keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReadWriteState:
    """Everything between two bursts. All of it is donated to the next one."""

    phase: Array  # [B] IDLE, READING, FLUSHING or FAILED
    llm: KVCache
    llm_length: Array  # [B] positions written
    hidden: Array  # [B, D] the LLM's last hidden state: it produces, and is paired with, the next text token
    seen: Array  # [B, V] text tokens generated in this turn (repetition penalty)
    text_count: Array  # [B]
    speech: KVCache
    speech_length: Array  # [B]
    pending: Array  # [B] the last speech token, not yet in the cache; -1 = none
    flush_count: Array  # [B]
    request: Request

    @classmethod
    def empty(
        cls,
        config: Omni2Config,
        slots: int,
        llm_capacity: int,
        speech_capacity: int,
        dtype=jnp.float32,
    ) -> "ReadWriteState":
        """`slots` idle slots; capacities in positions of the two caches."""
        zeros = lambda: jnp.zeros(slots, jnp.int32)  # noqa: E731 (a buffer each: all are donated)
        return cls(
            phase=zeros(),
            llm=KVCache.empty(config.llm, slots, llm_capacity, dtype),
            llm_length=zeros(),
            hidden=jnp.zeros((slots, config.llm.width), dtype),
            seen=jnp.zeros((slots, config.llm.vocabulary), bool),
            text_count=zeros(),
            speech=KVCache.empty(config.speech_lm, slots, speech_capacity, dtype),
            speech_length=zeros(),
            pending=zeros() - 1,
            flush_count=zeros(),
            request=request(config, slots),
        )

    def put(self, prefix: "ReadWriteState", slot: Array) -> "ReadWriteState":
        """This state with a lane, a state of one slot, in one of its slots."""
        return over_slots(
            lambda axis, whole, one: jax.lax.dynamic_update_slice_in_dim(whole, one, slot, axis),
            self,
            prefix,
        )

    def take(self, slot: Array) -> "ReadWriteState":
        """A slot as a lane. (As a dynamic slice, the caches of all slots would be gathered on every device of a mesh first.)"""
        return over_slots(lambda axis, whole: jnp.take(whole, slot[None], axis, mode="clip"), self)


def over_slots(function, *states: ReadWriteState) -> ReadWriteState:
    """Map `function(axis of the slots, *arrays)` over the arrays of states: the caches' slots are on their second axis."""
    bare = [dataclasses.replace(state, llm=None, speech=None) for state in states]
    caches = {
        name: jax.tree.map(functools.partial(function, 1), *(getattr(s, name) for s in states))
        for name in ("llm", "speech")
    }
    return dataclasses.replace(jax.tree.map(functools.partial(function, 0), *bare), **caches)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReadWriteOutput:
    """What one read/write did: `tokens` [B, R] text and `speech` [B, W] speech-LM token ids, -1 where there is none."""

    tokens: Array
    speech: Array
    phase: Array  # [B] after the burst


def request(
    config: Omni2Config,
    slots: int = 1,
    text=None,
    unit=None,
    text_eos=None,
    max_text: int = 256,
    max_flush: int = 1024,
    seed: int = 0,
) -> Request:
    """The same request for every slot; slot i draws from the seed's key folded with i."""
    eos = tuple(config.tokens.text_eos if text_eos is None else text_eos)
    if len(eos) > MAX_EOS:
        raise ValueError(f"{len(eos)} end-of-text tokens given, at most {MAX_EOS} are supported")
    return Request(
        text=text or Sampling.of(slots),
        unit=unit or Sampling.of(slots, temperature=1.0, top_k=50),
        text_eos=jnp.tile(jnp.array(eos + (-1,) * (MAX_EOS - len(eos)), jnp.int32), (slots, 1)),
        max_text=jnp.full(slots, max_text, jnp.int32),
        max_flush=jnp.full(slots, max_flush, jnp.int32),
        key=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(slots)),
    )


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
    """Start a turn in every slot with lengths > 0, behind whatever its LLM cache holds already; the rest is left as it is.

    ids: [B, T] new prompt tokens, `model.SPEECH` at each speech position, right-padded. features: [B, F, D] speech features,
    `first` of which were used by earlier pieces: a long prompt may come in several pieces, each through here.
    """
    time = jnp.arange(ids.shape[1])[None]
    positions = jnp.where(time < lengths[:, None], state.llm_length[:, None] + time, -1)
    hidden, llm = model.llm(model.embed_prompt(ids, features, first), positions, state.llm)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    start = lengths > 0
    pick = lambda new, old: jnp.where(start.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)  # noqa: E731
    return dataclasses.replace(
        state,
        phase=pick(READING, state.phase),
        llm=llm,
        llm_length=state.llm_length + lengths,
        hidden=pick(last.astype(state.hidden.dtype), state.hidden),
        seen=pick(False, state.seen),
        text_count=pick(0, state.text_count),
        speech_length=pick(0, state.speech_length),
        pending=pick(-1, state.pending),
        flush_count=pick(0, state.flush_count),
        request=jax.tree.map(pick, request, state.request),
    )


def read_write(
    model: Model, state: ReadWriteState, units_only: bool = True
) -> tuple[ReadWriteState, ReadWriteOutput]:
    """One burst of every slot: up to R text tokens, their fusion, up to W speech tokens. `units_only` masks all but units and eos."""
    state, tokens, hiddens, ended = read(model, state)
    state, speech = write(model, state, tokens, hiddens, ended, units_only)
    return state, ReadWriteOutput(tokens, speech, state.phase)


def read(model: Model, state: ReadWriteState) -> tuple[ReadWriteState, Array, Array, Array]:
    """Up to R text tokens [B, R] with the hidden states that produced them [B, R, D], and which texts ended [B]."""
    rows, asked, size = jnp.arange(state.phase.shape[0]), state.request, model.config.read

    def more(carry):
        i, _, _, _, reading = carry
        return (i < size) & jnp.any(reading)

    def one(carry):
        i, state, tokens, hiddens, reading = carry
        logits = model.llm.logits(state.hidden)
        failed = reading & ~jnp.all(jnp.isfinite(logits), axis=-1)
        reading &= ~failed
        logits = penalize(logits, state.seen, asked.text.repetition_penalty)
        keys = jax.vmap(jax.random.fold_in)(asked.key, 2 * state.text_count)
        token = jnp.where(reading, sample(logits, asked.text, keys), -1)
        count = state.text_count + reading
        over = jnp.any(token[:, None] == asked.text_eos, axis=-1) | (count >= asked.max_text)
        # The end token is fed too: it belongs to the history that the next turn continues.
        positions = jnp.where(reading, state.llm_length, -1)
        embedding = model.llm.embed(token).astype(state.hidden.dtype)
        hidden, llm = model.llm(embedding[:, None], positions[:, None], state.llm)
        tokens, hiddens = tokens.at[:, i].set(token), hiddens.at[:, i].set(state.hidden)
        state = dataclasses.replace(
            state,
            phase=jnp.where(failed, FAILED, state.phase),
            llm=llm,
            llm_length=state.llm_length + reading,
            hidden=jnp.where(reading[:, None], hidden[:, 0], state.hidden),
            seen=state.seen.at[rows, jnp.maximum(token, 0)].max(reading),
            text_count=count,
        )
        return i + 1, state, tokens, hiddens, reading & ~over

    reading = state.phase == READING
    tokens = jnp.full((rows.size, size), -1, jnp.int32)
    hiddens = jnp.zeros((rows.size, size, state.hidden.shape[-1]), state.hidden.dtype)
    _, state, tokens, hiddens, reading = jax.lax.while_loop(
        more, one, (0, state, tokens, hiddens, reading)
    )
    ended = (state.phase == READING) & ~reading
    return (
        dataclasses.replace(state, phase=jnp.where(ended, FLUSHING, state.phase)),
        tokens,
        hiddens,
        ended,
    )


def write(
    model: Model,
    state: ReadWriteState,
    tokens: Array,
    hiddens: Array,
    ended: Array,
    units_only: bool,
) -> tuple[ReadWriteState, Array]:
    """Feed the speech LM its last token, the fused rows and, where the text just ended, <sep>; then up to W speech tokens [B, W]."""
    config, active = model.config, (state.phase == READING) | (state.phase == FLUSHING)
    fused = model.fuse(hiddens, tokens)
    edge = lambda ids: model.speech_lm.embed(ids).astype(fused.dtype)[:, None]  # noqa: E731
    sep = jnp.full_like(state.pending, config.tokens.sep)
    rows = jnp.concatenate([edge(state.pending), fused, edge(sep)], axis=1)  # [B, 1 + R + 1, D]
    valid = (
        jnp.concatenate([(state.pending >= 0)[:, None], tokens >= 0, ended[:, None]], axis=1)
        & active[:, None]
    )
    positions = jnp.where(valid, state.speech_length[:, None] + jnp.cumsum(valid, axis=1) - 1, -1)
    hidden, cache = model.speech_lm(rows, positions, state.speech)
    last = jnp.argmax(positions, axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    state = dataclasses.replace(
        state, speech=cache, speech_length=state.speech_length + valid.sum(1)
    )
    return burst(model, state, hidden, active, units_only)


def burst(
    model: Model, state: ReadWriteState, hidden: Array, active: Array, units_only: bool
) -> tuple[ReadWriteState, Array]:
    """Up to W speech tokens, the first from `hidden` [B, D]; the last one stays pending, to be fed with the next rows."""
    config, asked, size = model.config, state.request, model.config.write
    flushing = state.phase == FLUSHING
    next_token = chooser(model, units_only)

    def put(i, state, hidden, speech, alive):
        keys = jax.vmap(jax.random.fold_in)(asked.key, 2 * state.speech_length + 1)
        failed = alive & ~jnp.all(
            jnp.isfinite(hidden), axis=-1
        )  # as finite as its logits, and a thousand times smaller
        alive &= ~failed
        token = jnp.where(alive, next_token(hidden, asked.unit, keys), -1)
        flushed = state.flush_count + (alive & flushing)
        state = dataclasses.replace(
            state,
            phase=jnp.where(failed, FAILED, state.phase),
            pending=jnp.where(alive, token, state.pending),
            flush_count=flushed,
        )
        over = (token == config.tokens.unit_eos) | (flushing & (flushed >= asked.max_flush))
        return state, speech.at[:, i].set(token), alive & ~over

    def more(carry):
        i, _, _, alive = carry
        return (i < size) & jnp.any(alive)

    def one(carry):
        i, state, speech, alive = carry
        embedding = model.speech_lm.embed(state.pending).astype(hidden.dtype)
        positions = jnp.where(alive, state.speech_length, -1)
        y, cache = model.speech_lm(embedding[:, None], positions[:, None], state.speech)
        state = dataclasses.replace(state, speech=cache, speech_length=state.speech_length + alive)
        state, speech, alive = put(i, state, y[:, 0], speech, alive)
        return i + 1, state, speech, alive

    state, speech, alive = put(
        0, state, hidden, jnp.full((active.size, size), -1, jnp.int32), active
    )
    _, state, speech, alive = jax.lax.while_loop(more, one, (1, state, speech, alive))
    # An eos in mid-stream only ends the burst; after the text it ends the turn, as does the cap.
    done = flushing & ~alive & active & (state.phase != FAILED)
    return dataclasses.replace(state, phase=jnp.where(done, IDLE, state.phase)), speech


def chooser(model: Model, units_only: bool):
    """A function (hidden [B, D], settings, keys) -> speech token [B].

    With `units_only` the head is the 6561 unit rows and eos alone: nothing else can be sampled, and 95 % of the head is not read.
    """
    lm, tokens, units = model.speech_lm, model.config.tokens, model.config.units
    if not units_only:
        return lambda hidden, settings, keys: sample(lm.logits(hidden), settings, keys)
    first = tokens.sep + 1
    head = constrain(
        lm.head_rows(first, units, tokens.unit_eos), "vocabulary", None
    )  # [U + 1, D], gathered before the loop, not in it

    def choose(hidden, settings, keys):
        logits = jnp.einsum("BD,UD->BU", hidden, head.astype(hidden.dtype)).astype(jnp.float32)
        unit = sample(logits, settings, keys)
        return jnp.where(unit == units, tokens.unit_eos, first + unit)

    return choose

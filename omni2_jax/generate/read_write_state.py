"""The state of the two language models between two steps, and the settings of each slot's turn.

B slots, R text tokens of a read, W speech tokens of a write, D LLM width, V vocabulary of the LLM,
S positions of a KV cache, L layers, K key/value heads, H their size.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from omni2_jax.config import DecoderConfig, Omni2Config
from omni2_jax.generate.options import SAMPLING, UNIT_TEMPERATURE, UNIT_TOP_K, Options
from omni2_jax.generate.sampling import Sampling
from omni2_jax.models.kv_cache import Cache, empty_cache

Array = jax.Array

# Phases of a slot. FAILED: logits were not finite. No step changes such a slot, as if it were idle.
IDLE, READING, FLUSHING, FAILED = range(4)
# Stands for a speech LM that is not there, so that its KV cache has a place in the state.
NO_SPEECH_LM = DecoderConfig(vocabulary=1, width=2, layers=1, heads=1, kv_heads=1, hidden=1)
MAX_EOS = 8  # end-of-text tokens that a request may name
MAX_FORCED = 2048  # text tokens that a request may force: about a quarter of an hour of speech


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """The settings of a turn. Every array has one row for each slot."""

    text: Sampling
    unit: Sampling
    text_eos: Array  # [B, MAX_EOS] end-of-text tokens, padded with -1
    forced: Array  # [B, MAX_FORCED] text tokens that are taken, not sampled; padded with -1
    max_text: Array  # [B] text tokens at most
    max_flush: Array  # [B] speech tokens at most after the end of the text
    key: Array  # [B] PRNG keys

    @classmethod
    def of(
        cls,
        config: Omni2Config,
        options: Options,
        defaults: Mapping[str, float | None] | None = None,
        text_eos: Sequence[int] | None = None,
        batch: int = 1,
    ) -> "Request":
        """The same request for `batch` slots; slot i has the seed's key, folded with i.

        defaults: the settings of generation_config.json, used where `options` leaves them open.
        text_eos: the tokens that end the text; None = those of the config.
        Raises ValueError for more than MAX_EOS of them.
        """
        text_eos = config.tokens.text_eos if text_eos is None else text_eos
        if len(text_eos) > MAX_EOS:
            raise ValueError(
                f"{len(text_eos)} end-of-text tokens given, at most {MAX_EOS} are supported"
            )
        chosen = {}
        for name in SAMPLING:
            for value in (getattr(options, name), (defaults or {}).get(name)):
                if value is not None:
                    chosen.setdefault(name, value)
        temperature = chosen.pop("unit_temperature", UNIT_TEMPERATURE)
        top_k = chosen.pop("unit_top_k", UNIT_TOP_K)
        padded = (*text_eos, *[-1] * (MAX_EOS - len(text_eos)))
        return cls(
            text=Sampling.of(batch, options.temperature, **chosen),
            unit=Sampling.of(batch, temperature, top_k=top_k),
            text_eos=jnp.tile(jnp.array(padded, jnp.int32), (batch, 1)),
            forced=jnp.full((batch, MAX_FORCED), -1, jnp.int32),
            max_text=jnp.full(batch, options.max_new_tokens, jnp.int32),
            max_flush=jnp.full(batch, options.max_flush_units, jnp.int32),
            key=jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.key(options.seed), jnp.arange(batch)
            ),
        )

    def saying(self, tokens: Sequence[int]) -> "Request":
        """The same request with these text tokens, MAX_FORCED at most, as the answer of every slot.

        The last one should be an end token, as in an answer that the model ends itself.
        """
        batch = self.max_text.size
        padded = (*tokens, *[-1] * (MAX_FORCED - len(tokens)))
        return dataclasses.replace(
            self,
            forced=jnp.tile(jnp.array(padded, jnp.int32), (batch, 1)),
            max_text=jnp.full(batch, len(tokens), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReadWriteState:
    """The state of the two language models between two steps. Its buffers are donated to a step.

    With batch size 1 it is a *prefix*: the state of one conversation outside of the engine's slots.
    """

    phase: Array  # [B] IDLE, READING, FLUSHING or FAILED
    llm: Cache
    llm_length: Array  # [B] positions written to the LLM's cache
    hidden: Array  # [B, D] the LLM's last hidden state: the next text token is sampled from it
    generated_mask: Array  # [B, V] text tokens of this turn, for the repetition penalty
    text_count: Array  # [B] text tokens of this turn
    speech: Cache
    speech_length: Array  # [B] positions written to the speech LM's cache
    last_speech_token: Array  # [B] the last one, which is not in the cache yet; -1 = none
    flush_count: Array  # [B] speech tokens since the end of the text
    request: Request

    @classmethod
    def empty(
        cls,
        config: Omni2Config,
        slots: int,
        llm_capacity: int,
        speech_capacity: int,
        dtype: jnp.dtype | type = jnp.float32,
        listed: bool = False,
    ) -> "ReadWriteState":
        """`slots` idle slots. The capacities are positions of the two KV caches, in `dtype`.

        listed: whether each layer has a cache of its own (`kv_cache.ListedKVCache`).
        """

        def zeros() -> Array:  # a buffer for each field: a buffer cannot be donated twice
            return jnp.zeros(slots, jnp.int32)

        return cls(
            phase=zeros(),
            llm=empty_cache(config.llm, slots, llm_capacity, dtype, listed),
            llm_length=zeros(),
            hidden=jnp.zeros((slots, config.llm.width), dtype),
            generated_mask=jnp.zeros((slots, config.llm.vocabulary), bool),
            text_count=zeros(),
            speech=(
                empty_cache(config.speech_lm, slots, speech_capacity, dtype, listed)
                if config.speech_lm
                else empty_cache(NO_SPEECH_LM, slots, 1, dtype, listed)
            ),
            speech_length=zeros(),
            last_speech_token=zeros() - 1,
            flush_count=zeros(),
            request=Request.of(config, Options(), batch=slots),
        )

    def put(self, prefix: "ReadWriteState", slot: Array) -> "ReadWriteState":
        """Copy `prefix`, a state with batch size 1, into slot `slot`."""

        def update(axis: int, array: Array, row: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(array, row, slot, axis)

        return map_slots(update, self, prefix)

    def take(self, slot: Array) -> "ReadWriteState":
        """Extract one slot as a prefix, a state with batch size 1.

        This uses `jnp.take`: on a mesh, a dynamic slice would all-gather the caches first.
        """

        def row(axis: int, array: Array) -> Array:
            return jnp.take(array, slot[None], axis, mode="clip")

        return map_slots(row, self)


def map_slots(function: Callable[..., Array], *states: ReadWriteState) -> ReadWriteState:
    """Map `function(slot axis, *arrays)` over the arrays of states.

    The slot axis is the first one, but for KV caches of all layers at once.
    """

    def map_node(node: Cache | Array, *others: Cache | Array):
        axis = getattr(node, "slot_axis", 0)
        return jax.tree.map(lambda *arrays: function(axis, *arrays), node, *others)

    return jax.tree.map(map_node, *states, is_leaf=lambda node: isinstance(node, Cache))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReadWriteOutput:
    """The tokens of one read and write of every slot, -1 where there is none."""

    text_tokens: Array  # [B, R]
    speech_tokens: Array  # [B, W] tokens of the speech LM: units, or its end token, or others

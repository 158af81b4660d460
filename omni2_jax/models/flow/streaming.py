"""The flow in chunks: every step takes a few new units of each stream and gives the mel frames that became available.

A chunk is finished when the look-ahead behind its last unit has arrived; nothing in it changes any more. Its keys and values (of each
layer, Euler step and guidance branch) stay in memory and only the open chunk is computed again: the same mel as the full pass over
everything so far, at a cost that does not grow. A pass computes one chunk of each stream, so that the memory is no larger than what a
chunk sees; a step that finishes a chunk and begins the next one takes two. B streams, W new units of a step at most, U units that wait
at most, S units in memory, M mel bins, F mel frames of a step at most.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.context import Chunks, Window
from omni2_jax.models.flow.matching import Flow, FlowPast

Array = jax.Array


@dataclass(frozen=True)
class Plan:
    """The sizes of a stream, in units; made by `of`."""

    chunks: Chunks
    write: int  # new units a step takes at most
    lookahead: int
    capacity: int  # the memory is a ring of whole chunks, so long in all
    ladder: bool

    @classmethod
    def of(
        cls,
        config: FlowConfig,
        write: int,
        chunks: Chunks | None = None,
        max_units: int | None = None,
        ladder: bool = True,
    ) -> "Plan":
        """chunks: by default the config's chunk, and everything before it.

        The memory holds a chunk and the `chunks.left` before it but no more than `max_units`: what is older is forgotten. With
        `ladder`, a pass that has less to compute or to see costs less. Without, there are one or two sizes, quicker to compile and as
        good for a batch that fills them anyway. Raises ValueError for no write at all, a memory without bounds, or one that outlasts
        the noise.
        """
        chunks = chunks or Chunks(config.chunk)
        if write < 1:
            raise ValueError(f"{write} new units a step, expected at least 1")
        if chunks.left is None and not max_units:
            raise ValueError("a flow that sees the whole past needs max_units")
        if chunks.left is None and config.upsample * max_units > config.noise_frames:
            raise ValueError(
                f"{max_units} units make {config.upsample * max_units} mel frames; the flow's noise has {config.noise_frames}"
            )
        needs = [] if chunks.left is None else [chunks.left + 1]
        needs += [-(-(max_units + chunks.shift) // chunks.size)] if max_units else []
        return cls(chunks, write, config.lookahead, min(needs) * chunks.size, ladder)

    @property
    def room(self) -> int:
        """The most units that an open chunk and what has arrived behind it can be."""
        return self.chunks.size + self.write + self.lookahead - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of a window: of these, a stream's pass computes the least that holds its work. Full writes fit exactly, unless tiny."""
        size = self.chunks.size
        if not self.ladder:  # what begins a chunk, or is left of the last one where each write completes one, need not cost a whole one
            rest = self.write if self.write < size else self.lookahead
            return (rest, size) if 0 < rest < size else (size,)
        late = (
            self.lookahead - self.chunks.shift
        ) % self.write  # units wanting when the write arrives that a chunk ends in
        stride = self.write * -(-size // (6 * self.write))  # each rung is compiled on its own
        return (*range(self.write - late, size, stride), size)

    @property
    def extents(self) -> tuple[int, ...]:
        """Slots of the memory: attention reads the least of these that holds what it sees."""
        parts = 4 if self.ladder and self.chunks.left is None else 1
        return tuple(-(-self.capacity * part // parts) for part in range(1, parts + 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowState:
    """Everything between two steps; donate it to the next one."""

    voice: Array  # [B, M]
    units: Array  # [B, U] units from `start` on
    count: Array  # [B] units that have arrived
    start: Array  # [B] the first unit of the open chunk
    given: Array  # [B] units whose mel has been given out
    tenant: Array  # [B, S] the unit whose keys lie in each slot of the memory, -1 where none
    past: FlowPast
    plan: Plan = field(metadata={"static": True})

    @classmethod
    def empty(cls, flow: Flow, voice: Array, plan: Plan, dtype=jnp.float32) -> "FlowState":
        """Streams that speak with `voice` [B, M], before their first units; `dtype` is that of the memory."""
        batch = len(voice)
        zeros = lambda: jnp.zeros(batch, jnp.int32)  # noqa: E731 (a buffer each, and a copy of the voice: all are donated)
        return cls(
            voice=jnp.array(voice),
            units=jnp.zeros((batch, plan.room), jnp.int32),
            count=zeros(),
            start=zeros(),
            given=zeros(),
            tenant=jnp.full((batch, plan.capacity), -1, jnp.int32),
            past=flow.past(batch, plan.capacity, dtype),
            plan=plan,
        )

    def restart(self, streams: Array, voice: Array) -> "FlowState":
        """New streams, with voices [B, M], where `streams` [B] is True."""
        fresh = {
            name: jnp.where(streams, 0, getattr(self, name)) for name in ("count", "start", "given")
        }
        tenant, voice = (
            jnp.where(streams[:, None], -1, self.tenant),
            jnp.where(streams[:, None], voice, self.voice),
        )
        return dataclasses.replace(self, **fresh, tenant=tenant, voice=voice)

    def append(self, new: Array, counts: Array) -> "FlowState":
        """The first counts[b] of the units new[b] arrive."""
        index = jnp.arange(self.plan.room) - (self.count - self.start)[:, None]
        arrived = jnp.take_along_axis(new, jnp.clip(index, 0, new.shape[1] - 1), 1)
        units = jnp.where((index >= 0) & (index < counts[:, None]), arrived, self.units)
        return dataclasses.replace(self, units=units, count=self.count + counts)

    def slot(self) -> Array:
        """Where in the memory the open chunk begins, [B]."""
        size = self.plan.chunks.size
        return (self.start + self.plan.chunks.shift) // size * size % self.plan.capacity

    def tenants(self, width: Array | int) -> Array:
        """`tenant` while the first `width` units of the open chunk lie there, [B, S]; the rest of its place is void."""
        at = jnp.arange(self.plan.capacity) - self.slot()[:, None]
        outside = (at < 0) | (at >= self.plan.chunks.size)
        return jnp.where(outside, self.tenant, jnp.where(at < width, self.start[:, None] + at, -1))


def frames_of(units: Array, rate: int) -> Array:
    """Indices of the frames of units [B, n] -> [B, rate * n]; -1 stays -1."""
    frames = jnp.where(units[..., None] < 0, -1, rate * units[..., None] + jnp.arange(rate))
    return frames.reshape(len(units), -1)


def compute(
    flow: Flow, state: FlowState, upto: Array, finished: Array, mine: Array, width: int
) -> tuple[Array, FlowPast]:
    """Mel [B, 2 width, M] of the open chunk's first `width` units, of which those before `upto` [B] exist.

    finished [B]: how many of the chunk's units become past; mine [B] bool: the streams whose past this is, the rest keep theirs.
    """
    config, plan, rate, past = flow.config, state.plan, flow.config.upsample, state.past
    wide = min(
        width + config.lookahead, plan.chunks.size
    )  # the encoder sees units that still wait for their mel,
    ahead = min(
        wide + config.lookahead, plan.room
    )  # and what it looks ahead to may belong to the next chunk
    slot = jnp.where(mine, state.slot(), plan.capacity)  # outside of the memory nothing is written

    def window(queries: int, keys: int, length: Array, rate: int) -> Window:
        query, key = (
            frames_of(state.start[:, None] + jnp.arange(queries), rate),
            frames_of(state.tenants(keys), rate),
        )
        extents = tuple(rate * extent for extent in plan.extents)
        return Window.over(
            query,
            key,
            rate * length,
            plan.chunks,
            rate,
            slot=rate * slot,
            kept=rate * finished,
            extents=extents,
        )

    units, frames = window(ahead, wide, state.count, 1), window(wide, wide, state.count, rate)
    features, encoder = flow.encoder(
        flow.embed(state.units[:, :ahead]), units, frames, past.encoder
    )
    mu, frames = flow.project(features[:, : rate * width]), window(width, width, upto, rate)
    z = jnp.take(flow.noise[...].astype(mu.dtype), frames.query % config.noise_frames, axis=0)
    mel, tails, memory = flow.solve(
        mu, state.voice, jnp.zeros_like(mu), z, frames, past.tails, past.memory
    )
    return mel, FlowPast(encoder, tails, memory)


def flow_step(
    flow: Flow, state: FlowState, new: Array, counts: Array, final: Array
) -> tuple[FlowState, Array, Array]:
    """One step of all streams -> (state, mel [B, F, M], mel frame counts [B]), F = 2 (W + lookahead).

    new [B, W]: units, of which the first counts [B] are new; final [B] bool: no more will come, so what lacks its look-ahead is
    given out, too. A stream without new units gives nothing, and after its end only `restart` makes it speak again.
    Reference: SpeechDecoder.token2wav, which runs everything again and keeps the mel from 2 * token_offset on.
    """
    plan, rate = state.plan, flow.config.upsample
    if new.shape[1] != plan.write:
        raise ValueError(f"{new.shape[1]} new units a step; the state was made for {plan.write}")
    state = state.append(new, counts)
    ready = jnp.where(final, state.count, jnp.maximum(state.count - plan.lookahead, state.given))
    frame = rate * state.given[:, None] + jnp.arange(rate * (plan.write + plan.lookahead))
    frames = rate * (ready - state.given)

    def advance(_, carry, mine: Array, upto: Array, width: int):
        """A pass of the streams `mine`, to the unit `upto`."""
        state, out = carry
        finished = jnp.where(mine & (upto == plan.chunks.end(state.start)), upto - state.start, 0)
        mel, past = compute(flow, state, upto, finished, mine, width)
        at = jnp.clip(frame - rate * state.start[:, None], 0, rate * width - 1)
        fresh = (
            mine[:, None] & (frame >= rate * state.given[:, None]) & (frame < rate * upto[:, None])
        )
        out = jnp.where(fresh[..., None], jnp.take_along_axis(mel, at[..., None], 1), out)
        state = dataclasses.replace(
            state,
            units=jnp.take_along_axis(
                state.units,
                jnp.minimum(jnp.arange(plan.room) + finished[:, None], plan.room - 1),
                1,
            ),
            start=state.start + finished,
            given=jnp.where(mine, upto, state.given),
            tenant=state.tenants(finished[:, None]),
            past=past,
        )
        return state, out

    def sweep(carry):
        """What is left of an open chunk, then what there is of the next one: mostly that takes a smaller window."""
        for width, below in zip(
            reversed(plan.widths), (*reversed(plan.widths[:-1]), 0), strict=True
        ):
            state, _ = carry
            upto = jnp.minimum(ready, plan.chunks.end(state.start))
            needed = jnp.where(upto > state.given, upto - state.start, 0)
            mine = (below < needed) & (needed <= width)
            # A loop that runs once or not at all: unlike a switch, it works on the past in place.
            carry = jax.lax.fori_loop(
                0,
                jnp.any(mine).astype(jnp.int32),
                partial(advance, mine=mine, upto=upto, width=width),
                carry,
            )
        return carry

    mel = jnp.zeros((*frame.shape, flow.config.mels))
    state, mel = jax.lax.while_loop(
        lambda carry: jnp.any(carry[0].given < ready), sweep, (state, mel)
    )
    return state, mel, frames

"""The flow in chunks: every step takes a few new units of each stream and gives the mel frames that became available.

A chunk is finished when the look-ahead behind its last unit has arrived; nothing in it changes any more. Its keys and values (of each
layer, Euler step and guidance branch) stay in memory and only the open chunk is computed again: the same mel as the full pass over
everything so far, at a cost that does not grow. B streams, W new units at most, U units of a window at most, S units in memory,
M mel bins, F mel frames given at most, T a window's frames.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from omni2_jax.flow.context import Chunks, Window
from omni2_jax.flow.matching import Flow, FlowPast

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowState:
    """Everything between two steps; donate it to the next one. The memory is a ring of chunks, and a window may hang over its end."""

    voice: Array  # [B, M]
    units: Array  # [B, U] units from `start` on
    count: Array  # [B] units that have arrived
    start: Array  # [B] the first unit of the open chunk
    given: Array  # [B] units whose mel has been given out
    tenant: Array  # [B, S] the unit whose keys lie in each slot of the memory, -1 where none
    past: FlowPast
    chunks: Chunks = field(metadata={"static": True})
    widths: tuple[int, ...] = field(metadata={"static": True})  # units of a window: a step computes the least that holds its work
    extents: tuple[int, ...] = field(metadata={"static": True})  # slots of the memory: attention reads the least that holds the past

    @classmethod
    def empty(
        cls,
        flow: Flow,
        voice: Array,
        write: int,
        chunks: Chunks | None = None,
        max_units: int | None = None,
        ladder: bool = True,
        dtype=jnp.float32,
    ) -> "FlowState":
        """Streams that speak with `voice` [B, M] and take up to `write` units a step.

        The memory holds what `chunks.left` needs, but no more than `max_units`: what is older is forgotten. With `ladder`, a step
        that has less to compute or to see costs less; without, there is one size, which is quicker to compile and as good for a
        batch that fills it anyway.
        Raises ValueError for a write larger than a chunk, a memory without bounds, or one that outlasts the noise.
        """
        config = flow.config
        chunks = chunks or Chunks(config.chunk)
        if write > chunks.size:
            raise ValueError(f"{write} new units a step could finish more than one chunk of {chunks.size}")
        if chunks.left is None and not max_units:
            raise ValueError("a flow that sees the whole past needs max_units")
        if chunks.left is None and config.upsample * max_units > config.noise_frames:
            raise ValueError(f"{max_units} units make {config.upsample * max_units} mel frames; the flow's noise has {config.noise_frames}")
        room = chunks.size + write + config.lookahead - 1  # the most units that an open chunk and what follows it can be
        ring = [] if chunks.left is None else [chunks.left + -(-room // chunks.size)]
        ring += [-(-(max_units + chunks.shift) // chunks.size)] if max_units else []
        capacity = min(ring) * chunks.size + room - chunks.size
        late = config.lookahead - chunks.shift % chunks.size  # units of a chunk that are not there yet when it has all its writes
        widths = [width for width in range(write - late, room, write) if width > 0] if ladder else []
        extents = [capacity]
        while ladder and extents[0] >= 4 * room:
            extents.insert(0, extents[0] // 2)
        count, batch = jnp.zeros(len(voice), jnp.int32), len(voice)
        return cls(
            voice=voice,
            units=jnp.zeros((batch, room), jnp.int32),
            count=count,
            start=count + 0,
            given=count + 0,
            tenant=jnp.full((batch, capacity), -1, jnp.int32),
            past=flow.past(batch, capacity, dtype),
            chunks=chunks,
            widths=(*widths, room),
            extents=tuple(extents),
        )

    def restart(self, streams: Array, voice: Array) -> "FlowState":
        """New streams, with voices [B, M], where `streams` [B] is True."""
        fresh = {name: jnp.where(streams, 0, getattr(self, name)) for name in ("count", "start", "given")}
        rows = streams[:, None]
        return dataclasses.replace(
            self, **fresh, tenant=jnp.where(rows, -1, self.tenant), voice=jnp.where(rows, voice.astype(self.voice.dtype), self.voice)
        )

    def slot(self) -> Array:
        """Where in the memory the open chunk goes, [B]."""
        ring = self.tenant.shape[1] - (self.units.shape[1] - self.chunks.size)
        first = self.start + self.chunks.shift
        return first // self.chunks.size * self.chunks.size % ring + first % self.chunks.size

    def tenants(self, width: Array | int) -> Array:
        """`tenant` with the first `width` units of the window in it, [B, S]."""
        at = jnp.arange(self.tenant.shape[1]) - self.slot()[:, None]
        outside = (at < 0) | (at >= self.units.shape[1])
        return jnp.where(outside, self.tenant, jnp.where(at < width, self.start[:, None] + at, -1))


def append(state: FlowState, new: Array, counts: Array) -> FlowState:
    """The first counts[b] of the units new[b] arrive."""
    index = jnp.arange(state.units.shape[1]) - (state.count - state.start)[:, None]
    arrived = jnp.take_along_axis(new, jnp.clip(index, 0, new.shape[1] - 1), 1)
    units = jnp.where((index >= 0) & (index < counts[:, None]), arrived, state.units)
    return dataclasses.replace(state, units=units, count=state.count + counts)


def frames_of(units: Array, rate: int) -> Array:
    """Indices of the frames of units [B, n] -> [B, rate * n]; -1 stays -1."""
    frames = jnp.where(units[..., None] < 0, -1, rate * units[..., None] + jnp.arange(rate))
    return frames.reshape(len(units), -1)


def compute(flow: Flow, state: FlowState, ready: Array, finished: Array, width: int) -> tuple[Array, FlowPast]:
    """Mel [B, 2 width, M] of the window's first `width` units, of which those before `ready` [B] exist.

    finished [B]: how many of the window's units become past.
    """
    config, chunks, rate, past = flow.config, state.chunks, flow.config.upsample, state.past
    wide = min(width + config.lookahead, state.units.shape[1])

    def window(width: int, length: Array, rate: int) -> Window:
        query, key = state.start[:, None] + jnp.arange(width), state.tenants(width)
        if rate > 1:
            query, key = frames_of(query, rate), frames_of(key, rate)
        extents = tuple(rate * size for size in state.extents)
        return Window.over(query, key, rate * length, chunks, rate, slot=rate * state.slot(), kept=rate * finished, extents=extents)

    x = flow.embed(state.units[:, :wide])
    features, encoder = flow.encoder(x, window(wide, state.count, 1), window(wide, state.count, rate), past.encoder)
    mu, frames = flow.project(features[:, : rate * width]), window(width, ready, rate)
    z = jnp.take(flow.noise[...].astype(mu.dtype), frames.query % config.noise_frames, axis=0)
    mel, tails, memory = flow.solve(mu, state.voice, jnp.zeros_like(mu), z, frames, past.tails, past.memory)
    return mel, FlowPast(encoder, tails, memory)


def flow_step(flow: Flow, state: FlowState, new: Array, counts: Array, final: Array) -> tuple[FlowState, Array, Array]:
    """One step of all streams -> (state, mel [B, F, M], mel frame counts [B]), F = 2 (W + lookahead).

    new [B, W]: units, of which the first counts [B] are new; final [B] bool: no more will come, so what lacks its look-ahead is
    given out, too. A stream without new units gives nothing, and after its end only `restart` makes it speak again.
    Reference: SpeechDecoder.token2wav, which keeps mel frames from 2 * token_offset on, without its full pass.
    """
    config, chunks, rate, room = flow.config, state.chunks, flow.config.upsample, state.units.shape[1]
    if new.shape[1] != room - chunks.size - config.lookahead + 1:
        raise ValueError(f"{new.shape[1]} new units a step; the state was made for {room - chunks.size - config.lookahead + 1}")
    state = append(state, new, counts)
    ready = jnp.where(final, state.count, jnp.maximum(state.count - config.lookahead, state.given))
    active, end = ready > state.given, chunks.end(state.start)
    finished = jnp.where(active & (state.count >= end + config.lookahead), end - state.start, 0)
    needed = jnp.max(jnp.where(active, ready - state.start, 0))
    most = rate * (new.shape[1] + config.lookahead)
    mel, past = jnp.zeros((len(ready), rate * room + most, config.mels)), state.past

    def at_width(_, carry, width):
        mel, past = compute(flow, dataclasses.replace(state, past=carry[1]), ready, finished, width)
        return carry[0].at[:, : rate * width].set(mel), past

    for below, width in zip(
        (0, *state.widths), state.widths, strict=False
    ):  # at most one of these loops runs, once; a switch would copy the past
        runs = (below < needed) & (needed <= width)
        mel, past = jax.lax.fori_loop(0, runs.astype(jnp.int32), partial(at_width, width=width), (mel, past))
    mel = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, most))(mel, rate * (state.given - state.start))
    frames = rate * (ready - state.given)
    state = dataclasses.replace(
        state,
        units=jnp.take_along_axis(state.units, jnp.minimum(jnp.arange(room) + finished[:, None], room - 1), 1),
        start=state.start + finished,
        given=ready,
        tenant=state.tenants(finished[:, None]),
        past=past,
    )
    return state, jnp.where((jnp.arange(most) < frames[:, None])[..., None], mel, 0), frames

"""The flow chunk by chunk: each step takes a few new units per stream and returns the new mel.

A chunk is finished once the look-ahead after its last unit has arrived: nothing in it changes any
more. Its keys and values (for each layer, Euler step and guidance branch) stay in a ring cache, and
only the open chunk is computed again. The mel equals that of the full pass over all units so far,
at a cost that does not grow. One pass computes one chunk of each stream, so the cache holds only
what a chunk attends to; a step that finishes a chunk and begins the next one runs two passes.

docs/streaming.md works through the numbers.
B streams, W new units a step at most, U units of the open chunk and after it at most, S units in
the cache, M mel bins, F mel frames a step at most.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.mask import Chunks, Window
from omni2_jax.models.flow.matching import Flow, FlowCache

Array = jax.Array

SMALL_RING = 100  # units; it is read whole: to choose a size is a branch, which a GPU waits for


@dataclass(frozen=True)
class StreamPlan:
    """The static sizes of a stream, in units. Made by `of`."""

    chunks: Chunks
    write: int  # W: new units a step at most
    lookahead: int
    capacity: int  # S: length of the ring, a whole number of chunks
    bucketed: bool

    @classmethod
    def of(
        cls,
        config: FlowConfig,
        write: int,
        chunks: Chunks | None = None,
        max_units: int | None = None,
        bucketed: bool = True,
    ) -> "StreamPlan":
        """The sizes for writes of at most `write` units.

        chunks: by default the config's chunk size and all chunks before. max_units: the longest
        answer; the cache holds a chunk and the `chunks.left` before it, but never more than this.
        bucketed: compile several window sizes, so that a pass with fewer units to compute costs
        less; otherwise one or two sizes, which compile faster.
        Raises ValueError if write < 1, if the cache would have no bound, or if the units need more
        noise than the model has.
        """
        chunks = chunks or Chunks(config.chunk)
        if write < 1:
            raise ValueError(f"{write} new units a step, expected at least 1")
        if chunks.left is None and not max_units:
            raise ValueError("a flow that attends to all chunks before its own needs max_units")
        frames = config.upsample * (max_units or 0)
        if chunks.left is None and frames > config.noise_frames:
            raise ValueError(
                f"{max_units} units make {frames} mel frames; "
                f"the flow's noise has {config.noise_frames}"
            )
        num_chunks = [] if chunks.left is None else [chunks.left + 1]
        if max_units:
            num_chunks.append(-(-(max_units + chunks.shift) // int(chunks.size)))
        capacity = min(num_chunks) * int(chunks.size)
        return cls(chunks, write, config.lookahead, capacity, bucketed)

    @property
    def chunk_size(self) -> int:
        """Units of a chunk. It is not traced, as in training."""
        return int(self.chunks.size)

    @property
    def max_open_units(self) -> int:
        """U: units of the open chunk and of what has arrived after it, at most."""
        return self.chunk_size + self.write + self.lookahead - 1

    @property
    def window_buckets(self) -> tuple[int, ...]:
        """Window sizes to compile, ascending. A pass uses the smallest that holds its units.

        A window begins at the chunk's first unit, so it grows while its chunk fills up. With writes
        of 10, a look-ahead of 3 and chunks of 50, the frames of units 0-6 are due after the first
        write, those of units 0-16 after the second, and so on:

            In:  bucketed, write 10, look-ahead 3, chunk 50      Out: 7 17 37 50
                 not bucketed                                    Out: 10 50

        Each is about twice the one before: a program of its own, it takes time to compile and to
        load from the compilation cache.
        """
        size = self.chunk_size
        if not self.bucketed:
            # A short window serves the first units of a chunk, or the tail after the last one.
            short = self.write if self.write < size else self.lookahead
            return (short, size) if 0 < short < size else (size,)
        # How many units of a write cannot be computed yet, counted from the start of a chunk.
        missing = (self.lookahead - self.chunks.shift) % self.write
        sizes, width = [], self.write - missing
        # Of more units than this, the whole chunk takes hardly longer.
        while width <= size - max(1, self.write // 2):
            sizes.append(width)
            width += self.write * -(-width // self.write)
        return (*sizes, size)

    @property
    def read_sizes(self) -> tuple[int, ...]:
        """How much of the ring attention may read: the smallest that holds all visible keys."""
        if not self.bucketed or self.capacity <= SMALL_RING:
            return (self.capacity,)
        if self.chunks.left is None:
            return tuple(-(-self.capacity * part // 4) for part in range(1, 5))
        few = 2 * self.chunk_size  # of a short answer
        return (few, self.capacity) if few < self.capacity else (self.capacity,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowState:
    """State carried from one step to the next. Its buffers are donated."""

    voice: Array  # [B, M]
    open_units: Array  # [B, U] units from `chunk_start` on
    num_units: Array  # [B] units that have arrived
    chunk_start: Array  # [B] first unit of the open chunk
    num_delivered: Array  # [B] units whose mel has been returned
    cached_units: Array  # [B, S] which unit each place of the ring holds, -1 if empty
    cache: FlowCache
    plan: StreamPlan = field(metadata={"static": True})

    @classmethod
    def empty(cls, flow: Flow, voice: Array, plan: StreamPlan, dtype=jnp.float32) -> "FlowState":
        """Streams with `voice` [B, M] before their first units. dtype: that of the cache."""
        batch = len(voice)
        # Each field has its own buffer, the voice too, since all of them are donated.
        return cls(
            voice=jnp.array(voice),
            open_units=jnp.zeros((batch, plan.max_open_units), jnp.int32),
            num_units=jnp.zeros(batch, jnp.int32),
            chunk_start=jnp.zeros(batch, jnp.int32),
            num_delivered=jnp.zeros(batch, jnp.int32),
            cached_units=jnp.full((batch, plan.capacity), -1, jnp.int32),
            cache=flow.empty_cache(batch, plan.capacity, dtype),
            plan=plan,
        )

    def restart(self, slots: Array, voice: Array) -> "FlowState":
        """Begin new streams with voices [B, M] where `slots` [B] is True.

        The cache is not cleared: no frame attends to a place that `cached_units` calls empty.
        """
        return dataclasses.replace(
            self,
            voice=jnp.where(slots[:, None], voice, self.voice),
            num_units=jnp.where(slots, 0, self.num_units),
            chunk_start=jnp.where(slots, 0, self.chunk_start),
            num_delivered=jnp.where(slots, 0, self.num_delivered),
            cached_units=jnp.where(slots[:, None], -1, self.cached_units),
        )

    def append(self, new: Array, counts: Array) -> "FlowState":
        """Add the first counts[b] units of new[b] to stream b.

        In:  open_units 4 5 - - - -   new 6 7 8   count 2
        Out: open_units 4 5 6 7 - -
        """
        index = jnp.arange(self.plan.max_open_units) - (self.num_units - self.chunk_start)[:, None]
        added = jnp.take_along_axis(new, jnp.clip(index, 0, new.shape[1] - 1), 1)
        units = jnp.where((index >= 0) & (index < counts[:, None]), added, self.open_units)
        return dataclasses.replace(self, open_units=units, num_units=self.num_units + counts)

    def finish(self, counts: Array) -> "FlowState":
        """Close the open chunk of each stream b with counts[b] > 0, its number of units.

        In:  chunk_start 47   open_units of 47 48 49 ... 98   count 50
        Out: chunk_start 97   open_units of 97 98
        """
        index = jnp.arange(self.plan.max_open_units) + counts[:, None]
        index = jnp.minimum(index, self.plan.max_open_units - 1)
        return dataclasses.replace(
            self,
            open_units=jnp.take_along_axis(self.open_units, index, 1),
            chunk_start=self.chunk_start + counts,
            cached_units=self.cached_units_with(counts[:, None]),
        )

    def ring_start(self) -> Array:
        """The place in the ring where the open chunk begins, [B]."""
        size = self.plan.chunk_size
        return (self.chunk_start + self.plan.chunks.shift) // size * size % self.plan.capacity

    def cached_units_with(self, width: Array | int) -> Array:
        """`cached_units` after the first `width` units of the open chunk are written, [B, S].

        The other places of the open chunk are empty. Example: chunks of 3, capacity 6.

            In:  cached_units 0 1 2 . . .   chunk_start 3   width 2
            Out:              0 1 2 3 4 .
        """
        index = jnp.arange(self.plan.capacity) - self.ring_start()[:, None]
        outside = (index < 0) | (index >= self.plan.chunk_size)
        chunk = jnp.where(index < width, self.chunk_start[:, None] + index, -1)
        return jnp.where(outside, self.cached_units, chunk)


def frames_of(units: Array, rate: int) -> Array:
    """Frame indices of unit indices [B, n] -> [B, rate * n]; all frames of unit -1 are -1.

    In:  units 3 4 -1, rate 2
    Out: 6 7 8 9 -1 -1
    """
    frames = jnp.where(units[..., None] < 0, -1, rate * units[..., None] + jnp.arange(rate))
    return frames.reshape(len(units), -1)


def compute(
    flow: Flow, state: FlowState, target: Array, finished: Array, active: Array, width: int
) -> tuple[Array, FlowCache]:
    """Mel [B, 2 width, M] of the open chunk's first `width` units, and the cache after it.

    target [B]: the first unit whose mel is not due; finished [B]: how many units of the chunk will
    not change again; active [B] bool: streams of this pass; the caches of the others do not change.
    """
    config, plan, rate = flow.config, state.plan, flow.config.upsample
    # The encoder takes the units whose mel is due and their look-ahead, which also has keys, ...
    encoded = min(width + config.lookahead, plan.chunk_size)
    # ... and mixes each of them with the units after it, which may belong to the next chunk.
    mixed = min(encoded + config.lookahead, plan.max_open_units)
    # Behind the ring's end nothing is written.
    ring_start = jnp.where(active, state.ring_start(), plan.capacity)

    def window(queries: int, keys: int, num_units: Array, rate: int) -> Window:
        query = frames_of(state.chunk_start[:, None] + jnp.arange(queries), rate)
        key = frames_of(state.cached_units_with(keys), rate)
        return dataclasses.replace(
            Window.build(query, key, rate * num_units, plan.chunks, rate),
            ring_start=rate * ring_start,
            num_finished=rate * finished,
            read_sizes=tuple(rate * size for size in plan.read_sizes),
        )

    units = window(mixed, encoded, state.num_units, 1)
    frames = window(encoded, encoded, state.num_units, rate)
    embedded = flow.embed(state.open_units[:, :mixed])
    with jax.named_scope("encoder"):
        features, encoder = flow.encoder(embedded, units, frames, state.cache.encoder)
        mu = flow.project(features[:, : rate * width])
    frames = window(width, width, target, rate)
    z = jnp.take(flow.noise[...].astype(mu.dtype), frames.query % config.noise_frames, axis=0)
    cond = jnp.zeros_like(mu)  # no prompt
    mel, estimator = flow.solve(mu, state.voice, cond, z, frames, state.cache.estimator)
    return flow.restored(mel), FlowCache(encoder, estimator)


def flow_step(
    flow: Flow, state: FlowState, new: Array, counts: Array, final: Array
) -> tuple[FlowState, Array, Array]:
    """One step of all streams -> (state, mel [B, F, M], frame counts [B]), F = 2 (W + lookahead).

    new [B, W]: units, of which the first counts [B] are new; final [B] bool: no more units will
    come, so the frames of the last units are returned without their look-ahead. A stream without
    new units returns nothing. After `final`, call `restart` before the slot is used again.
    Raises ValueError if W is not the plan's.
    Reference: SpeechDecoder.token2wav, which computes all units again in every call.
    """
    plan, rate = state.plan, flow.config.upsample
    if new.shape[1] != plan.write:
        raise ValueError(f"{new.shape[1]} new units a step; the state was made for {plan.write}")
    state = state.append(new, counts)
    known = jnp.maximum(state.num_units - plan.lookahead, state.num_delivered)
    ready = jnp.where(final, state.num_units, known)
    frame = rate * state.num_delivered[:, None] + jnp.arange(rate * (plan.write + plan.lookahead))
    frames = rate * (ready - state.num_delivered)

    def advance(_, carry, active: Array, target: Array, width: int):
        """One pass of the `active` streams, up to the unit `target`."""
        state, out = carry
        finished = active & (target == plan.chunks.end(state.chunk_start))
        finished = jnp.where(finished, target - state.chunk_start, 0)
        with jax.named_scope(f"flow_{width}"):
            mel, cache = compute(flow, state, target, finished, active, width)
        index = jnp.clip(frame - rate * state.chunk_start[:, None], 0, rate * width - 1)
        is_new = (frame >= rate * state.num_delivered[:, None]) & (frame < rate * target[:, None])
        is_new = active[:, None] & is_new
        out = jnp.where(is_new[..., None], jnp.take_along_axis(mel, index[..., None], 1), out)
        num_delivered = jnp.where(active, target, state.num_delivered)
        state = dataclasses.replace(
            state.finish(finished), num_delivered=num_delivered, cache=cache
        )
        return state, out

    def advance_all(carry):
        """Advance every stream by one chunk at most.

        Window sizes are tried from the largest: finishing a chunk mostly takes a larger window than
        beginning the next one, so both may happen in one round.
        """
        buckets = plan.window_buckets
        for smaller, width in reversed(list(zip((0, *buckets[:-1]), buckets, strict=True))):
            state, _ = carry
            target = jnp.minimum(ready, plan.chunks.end(state.chunk_start))
            needed = jnp.where(target > state.num_delivered, target - state.chunk_start, 0)
            active = (smaller < needed) & (needed <= width)
            # A loop of one or no iteration: unlike a conditional, it updates the cache in place.
            iterations = jnp.any(active).astype(jnp.int32)
            body = partial(advance, active=active, target=target, width=width)
            carry = jax.lax.fori_loop(0, iterations, body, carry)
        return carry

    def unfinished(carry) -> Array:
        return jnp.any(carry[0].num_delivered < ready)

    mel = jnp.zeros((*frame.shape, flow.config.mels))
    state, mel = jax.lax.while_loop(unfinished, advance_all, (state, mel))
    return state, mel, frames

"""The flow in chunks against the released sessions and against the full pass over all units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.config import Omni2Config
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.streaming_step import plan_of
from omni2_jax.models.flow.mask import Chunks
from omni2_jax.models.flow.streaming import FlowState, StreamPlan, flow_step
from tests.support.compare import close
from tests.support.networks import TINY_FLOW as TINY
from tests.support.networks import decoder_golden as golden
from tests.support.networks import full_pass, tiny_flow

VOICES = jnp.asarray(np.random.default_rng(0).standard_normal((3, 80)), jnp.float32)


@functools.cache
def jitted_step():
    graph, params = nnx.split(tiny_flow())
    step = jax.jit(
        lambda params, state, *given: flow_step(nnx.merge(graph, params), state, *given),
        donate_argnums=1,
    )
    return functools.partial(step, params)


def released_voice() -> jax.Array:
    return tiny_flow().voice(jnp.asarray(golden("flow")["embedding"])[None])


def feed(
    state: FlowState, rows: list[tuple[np.ndarray, bool]]
) -> tuple[FlowState, list[np.ndarray]]:
    """One step: (new units, final) of each stream -> the mel that each gives."""
    new = np.zeros((len(rows), state.plan.write), np.int32)
    for row, (units, _) in zip(new, rows, strict=True):
        row[: len(units)] = units
    counts, final = (
        jnp.array([len(units) for units, _ in rows]),
        jnp.array([final for _, final in rows]),
    )
    state, mel, frames = jitted_step()(state, jnp.asarray(new), counts, final)
    return state, [row[:count] for row, count in zip(np.asarray(mel), frames, strict=True)]


def released_sessions() -> list[tuple[list[tuple[np.ndarray, bool]], list[np.ndarray]]]:
    """The units of each released session, call by call, and the mel frames that each call added."""
    sessions = []
    for want in (golden(f"stream_{name}") for name in ("s1", "s2", "s3")):
        last = len(want["chunks"]) - 1
        parts = np.split(want["units"], np.cumsum(want["chunks"])[:-1])
        mel = [want[f"c{call}_hift_in"].T[8 if call else 0 :] for call in range(last + 1)]
        sessions.append(([(part, call == last) for call, part in enumerate(parts)], mel))
    return sessions


@pytest.mark.slow
def test_released_sessions_side_by_side_and_again_in_a_used_slot():
    """Sessions of 6, 2 and 8 calls in three slots; the slot of the second then serves the third."""
    sessions, idle = released_sessions(), (np.zeros(0, np.int32), False)
    sessions[1] = tuple(own + again for own, again in zip(sessions[1], sessions[2], strict=True))
    state = FlowState.empty(
        tiny_flow(),
        jnp.tile(released_voice(), (3, 1)),
        StreamPlan.of(TINY, 10, max_units=80, bucketed=False),
    )
    for call in range(10):
        if call == 2:
            state = state.restart(jnp.array([False, True, False]), state.voice)
        state, mel = feed(state, [fed[call] if call < len(fed) else idle for fed, _ in sessions])
        for ours, (_, theirs) in zip(mel, sessions, strict=True):
            if call < len(theirs):
                assert ours.shape == theirs[call].shape
                close(ours, theirs[call], 5e-4)
            else:
                assert len(ours) == 0
    np.testing.assert_array_equal(state.num_delivered, [53, 72, 72])


CASES = {
    "everything before, in parts": StreamPlan.of(TINY, 5, Chunks(5, shift=3), max_units=64),
    "one chunk before": StreamPlan.of(TINY, 5, Chunks(5, left=1), bucketed=False),
    "one chunk before, writes that complete chunks": StreamPlan.of(
        TINY, 5, Chunks(5, left=1, shift=3), bucketed=False
    ),
    "two chunks before": StreamPlan.of(TINY, 5, Chunks(6, left=2, shift=1), bucketed=False),
    "chunks smaller than a write": StreamPlan.of(TINY, 5, Chunks(4, left=2, shift=1)),
}


# Each case is compiled. The nightly ones are other sizes of those before and after them. Of writes
# that complete chunks, test_a_cache_in_half_precision_is_close compares the end.
MARKS = {
    "one chunk before": pytest.mark.nightly,
    "one chunk before, writes that complete chunks": pytest.mark.nightly,
    "two chunks before": pytest.mark.nightly,
    "chunks smaller than a write": pytest.mark.slow,
}
PARAMS = [pytest.param(plan, id=name, marks=MARKS.get(name, ())) for name, plan in CASES.items()]


@pytest.mark.parametrize("plan", PARAMS)
def test_every_step_equals_the_full_pass_over_all_units_so_far(plan):
    """Three streams with writes of different sizes, also of none; two of them end early."""
    rng = np.random.default_rng(1)
    comes = [[5] * 9, [1, 2, 0, 5, 4, 5, 5, 3, 1], [5, 5, 5, 3, 0, 0, 0, 0, 0]]
    units = jnp.asarray(rng.integers(0, TINY.units, (3, 45)))
    ends = (99, 8, 3)
    state, given, arrived = (
        FlowState.empty(tiny_flow(), VOICES, plan),
        np.zeros(3, int),
        np.zeros(3, int),
    )
    for call in range(9):
        counts = np.array([row[call] for row in comes])
        rows = [
            (np.asarray(units[b, arrived[b] : arrived[b] + counts[b]]), call == ends[b])
            for b in range(3)
        ]
        state, mel = feed(state, rows)
        arrived = arrived + counts
        final = jnp.array([call >= end for end in ends])
        whole, frames = full_pass()(units, jnp.asarray(arrived), VOICES, final, None, plan.chunks)
        for b in range(3):
            assert len(mel[b]) == frames[b] - given[b]
            close(mel[b], whole[b, given[b] : frames[b]], 1e-4)
        given = np.asarray(frames)


def plan_of_one_chunk(size: int) -> StreamPlan:
    """The engine's plan where a write of `size` units is a chunk."""
    config = Omni2Config(write=size, flow=TINY)
    return plan_of(config, EngineConfig(flow_chunk=size, flow_left_chunks=1))


def test_writes_of_one_chunk():
    """The first chunk is shorter, so that the look-ahead of a write's end is a write's end, too."""
    assert TINY.lookahead == 3
    plans = [plan_of_one_chunk(size) for size in (1, 2, 3, 4, 10)]
    assert [plan.chunks.shift for plan in plans] == [0, 1, 0, 3, 3]
    assert [plan.window_buckets for plan in plans] == [(1,), (2,), (3,), (4,), (10,)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_writes_of_one_chunk_within_the_look_ahead(size):
    """Each write completes one chunk once the look-ahead has arrived, as the full pass has it."""
    plan = plan_of_one_chunk(size)
    units = jnp.asarray(np.random.default_rng(2).integers(0, TINY.units, (3, 13)))
    state, given = FlowState.empty(tiny_flow(), VOICES, plan), []
    for begin in range(0, 13, size):
        rows = np.asarray(units[:, begin : begin + size])
        state, mel = feed(state, [(row, begin + size >= 13) for row in rows])
        given.append(np.stack(mel))
        arrived = min(begin + size, 13)
        if arrived < 13:
            assert state.chunk_start[0] == max(0, arrived - TINY.lookahead)
    whole, _ = full_pass()(units, jnp.full(3, 13), VOICES, jnp.ones(3, bool), None, plan.chunks)
    close(np.concatenate(given, 1), whole, 1e-4)


def test_one_compilation_in_place():
    """Steps of all kinds compile once and update the donated state in place."""
    plan = CASES["everything before, in parts"]
    state = FlowState.empty(tiny_flow(), VOICES, plan)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    given = jnp.zeros((3, 5), jnp.int32), jnp.array([5, 0, 3]), jnp.zeros(3, bool)
    used = jitted_step().func.lower(*jitted_step().args, state, *given).compile().memory_analysis()
    assert used.alias_size_in_bytes >= size and used.temp_size_in_bytes < size / 2
    state, _, _ = jitted_step()(state, *given)
    before = jitted_step().func._cache_size()
    for final in (False, True):
        state, _, _ = jitted_step()(state, *given[:2], jnp.full(3, final))
    assert jitted_step().func._cache_size() == before


@pytest.mark.slow
def test_a_cache_in_half_precision_is_close():
    """Every write finishes a chunk, so a stream returns what the full pass returns."""
    plan = CASES["one chunk before, writes that complete chunks"]
    state, given = FlowState.empty(tiny_flow(), VOICES, plan, jnp.bfloat16), []
    units = jnp.tile(jnp.arange(45), (3, 1))
    for part in np.split(np.arange(45), 9):
        state, mel = feed(state, [(part, False)] * 3)
        given.append(mel[0])
    whole, frames = full_pass()(
        units, jnp.full(3, 45), VOICES, jnp.zeros(3, bool), None, plan.chunks
    )
    given = np.concatenate(given)
    assert len(given) == frames[0] == 84
    error = np.abs(given - whole[0, :84])
    assert 1e-5 < error.max() < 0.1 and error.mean() < 0.005


def test_plans_that_cannot_work_are_errors():
    with pytest.raises(ValueError, match="0 new units a step, expected at least 1"):
        StreamPlan.of(TINY, 0, Chunks(10, left=1))
    with pytest.raises(ValueError, match="needs max_units"):
        StreamPlan.of(TINY, 10)
    with pytest.raises(ValueError, match="602 mel frames; the flow's noise has 600"):
        StreamPlan.of(TINY, 10, max_units=301)
    with pytest.raises(ValueError, match="expected size >= 1"):
        Chunks(4, shift=4)
    state = FlowState.empty(tiny_flow(), VOICES, CASES["two chunks before"])
    with pytest.raises(ValueError, match="4 new units a step; the state was made for 5"):
        flow_step(
            tiny_flow(),
            state,
            jnp.zeros((3, 4), jnp.int32),
            jnp.zeros(3, jnp.int32),
            jnp.zeros(3, bool),
        )


def test_sizes_for_the_released_chunk():
    """The window sizes that writes of 10 units can need, and a cache of what a chunk attends to."""
    plan = StreamPlan.of(TINY, 10, max_units=300)
    assert plan.window_buckets == (7, 17, 37, 50) and plan.capacity == 300
    plan = StreamPlan.of(TINY, 10, Chunks(10, left=3, shift=3))
    assert plan.window_buckets == (10,) and plan.capacity == 40
    assert StreamPlan.of(TINY, 10, Chunks(10, left=3, shift=3), bucketed=False).window_buckets == (
        3,
        10,
    )
    assert StreamPlan.of(TINY, 10, Chunks(50, left=3), bucketed=False).window_buckets == (10, 50)

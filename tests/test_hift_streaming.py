"""Streaming HiFT against the released SpeechDecoder, and a steady tone against one pass over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.models.vocoder.hift import Hift
from omni2_jax.models.vocoder.hift_streaming import HiftState, hift_step
from tests.support.compare import assert_wav
from tests.support.networks import TINY_HIFT as TINY
from tests.support.networks import hift_params, stored_draws, tiny_hift
from tests.support.paths import DECODER

NEW = 20  # frames of a step at most
INPUT_RATE, HOLD = TINY.samples_per_frame, TINY.overlap * TINY.samples_per_frame
STREAMS = ("s1", "s2", "s3")


@pytest.fixture(scope="module")
def step():
    """The compiled step of three slots with the reference's draws, its state donated."""
    hift, (phase, noise) = tiny_hift(hift_params()), stored_draws()
    phase, noise = jnp.tile(phase, (3, 1)), jnp.tile(noise[:, : HOLD + NEW * INPUT_RATE], (3, 1, 1))
    return jax.jit(
        lambda state, *chunk: hift_step(hift, state, *chunk, phase, noise), donate_argnums=0
    )


@pytest.fixture(scope="module")
def streams():
    return {name: np.load(DECODER / f"stream_{name}.npz") for name in STREAMS}


def new_frames(stream, chunk: int) -> np.ndarray:
    return stream[f"c{chunk}_hift_in"].T[TINY.overlap if chunk else 0 :]


def batch(pieces: list[tuple[np.ndarray, bool]]):
    """(mel [n, M], final) of each slot -> mel with rubbish behind its end, frames, final."""
    mel = np.full((len(pieces), NEW, TINY.mels), np.nan, np.float32)
    for row, (piece, _) in zip(mel, pieces, strict=True):
        row[: len(piece)] = piece
    return (
        jnp.asarray(mel),
        jnp.array([len(piece) for piece, _ in pieces]),
        jnp.array([final for _, final in pieces]),
    )


def test_released_streams(step, streams):
    """Each chunk equals the released one, in slots that wait, end and start at other times."""
    # Chunk of each slot at each step, None = nothing arrives; s2 goes through its slot twice.
    plan = [
        (0, None, None),
        (1, None, 0),
        (2, 0, 1),
        (3, None, 2),
        (4, 1, None),
        (5, 0, 3),
        (None, 1, 4),
    ]
    plan += [(None, None, chunk) for chunk in (5, 6, 7)]
    last = [len(streams[name]["chunks"]) - 1 for name in STREAMS]
    nothing = np.zeros((0, TINY.mels), np.float32)
    state = HiftState.empty(TINY, 3)
    for chunks in plan:
        slots = list(zip(STREAMS, chunks, last, strict=True))
        arrived = [
            (nothing, False) if c is None else (new_frames(streams[name], c), c == end)
            for name, c, end in slots
        ]
        state, samples, counts = step(state, *batch(arrived))
        for slot, (name, chunk, end) in enumerate(slots):
            expected = np.zeros(0, np.float32) if chunk is None else streams[name][f"c{chunk}_wav"]
            assert counts[slot] == expected.size and not np.any(samples[slot, expected.size :])
            if chunk is not None:
                assert_wav(samples[slot, : expected.size], expected, 2e-2, 1e-3)
                assert state.num_held[slot] == (0 if chunk == end else TINY.overlap)
            if chunk is not None and chunk < end:
                np.testing.assert_array_equal(
                    state.mel[slot], streams[name][f"c{chunk}_cache_mel"].T
                )
                np.testing.assert_allclose(
                    state.source[slot],
                    streams[name][f"c{chunk}_cache_source"][0],
                    rtol=0,
                    atol=1e-3,
                )
                assert_wav(
                    state.samples[slot], streams[name][f"c{chunk}_cache_speech"][0], 2e-2, 1e-3
                )


class Tone:
    """Stands in for the vocoder: a mel frame's first bin is the pitch of a pure tone in Hz."""

    config, cycles, source = TINY, Hift.cycles, Hift.source

    def f0(self, mel, frames):
        return mel[..., 0]

    def harmonic_mix(self, sines):
        return sines[..., :1]

    def decode(self, mel, frames, source):
        return source


@pytest.fixture(scope="module")
def tone_step():
    noise = jnp.zeros((1, HOLD + NEW * INPUT_RATE, TINY.harmonics + 1))

    def run(state, mel, frames, final, phase, seamless: bool):
        return hift_step(Tone(), state, mel, frames, final, phase, noise, seamless)

    return jax.jit(run, static_argnums=5)


def tone(pitch: float, frames: int) -> np.ndarray:
    mel = np.full((1, frames, 1), pitch, np.float32)
    noise = jnp.zeros((1, frames * INPUT_RATE, TINY.harmonics + 1))
    return np.asarray(Tone().source(mel[..., 0], jnp.zeros((1, TINY.harmonics + 1)), noise))[0]


def stream_tone(tone_step, pitch: float, pieces: list[int], seamless: bool) -> list[np.ndarray]:
    """The samples of each step, the last one final.

    A seamless stream gets another phase after its first vocoded step, which it must not use.
    """
    state, given = HiftState.empty(TINY, 1), []
    for i, count in enumerate(pieces):
        chunk = batch([(np.full((count, TINY.mels), pitch, np.float32), i == len(pieces) - 1)])
        phase = jnp.full(
            (1, TINY.harmonics + 1), 1.0 if seamless and sum(pieces[:i]) >= TINY.overlap else 0.0
        )
        state, samples, counts = tone_step(state, *chunk, phase, seamless)
        given.append(np.asarray(samples[0, : counts[0]]))
    return given


@pytest.mark.parametrize(
    "pieces", [[14, 20, 20, 7, 20, 12], [3, 4, 1, 2, 5, 20, 1], [20, 20, 0], [5], [8, 0, 8]]
)
def test_seamless_tone_has_no_joins(tone_step, pieces):
    """A steady tone of no whole number of cycles a frame comes out as in one pass."""
    given = np.concatenate(stream_tone(tone_step, 211.3, pieces, seamless=True))
    np.testing.assert_allclose(given, tone(211.3, sum(pieces)), rtol=0, atol=1e-4)


def test_energy_at_the_released_joins(tone_step):
    """A tone that fits the frames is unchanged, but for the sum of the released fades, 1.08."""
    pieces = [14, 20, 20, 20]
    given, whole = (
        np.concatenate(stream_tone(tone_step, 200.0, pieces, seamless=False)),
        tone(200.0, sum(pieces)),
    )
    gain = np.ones(whole.size, np.float32)
    for join in np.cumsum(pieces)[:-1] * INPUT_RATE:
        gain[join - HOLD : join] = 1.08
    np.testing.assert_allclose(given, gain * whole, rtol=0, atol=1e-4)


def test_waits_for_an_overlap(tone_step):
    """No samples until there are more than `overlap` frames; none when an empty slot ends."""
    counts = [
        piece.size // INPUT_RATE
        for piece in stream_tone(tone_step, 200.0, [3, 4, 0, 1, 2, 0, 0], seamless=False)
    ]
    assert counts == [0, 0, 0, 0, 2, 0, 8]
    assert [piece.size for piece in stream_tone(tone_step, 200.0, [0, 0], seamless=False)] == [0, 0]


def test_compiles_once_and_reuses_the_state(step):
    state = HiftState.empty(TINY, 3)
    for frames in (14, 20, 0):
        state, _, _ = step(
            state, *batch([(np.zeros((frames, TINY.mels), np.float32), frames == 0)] * 3)
        )
    assert step._cache_size() == 1
    compiled = step.lower(
        state, *batch([(np.zeros((0, TINY.mels), np.float32), False)] * 3)
    ).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )

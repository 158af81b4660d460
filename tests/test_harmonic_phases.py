"""The loss of the harmonics' phases, by hand on voices whose phases are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.train import harmonic_phases

FRAMES = 12
BOTH = jnp.array([True, True])


def voice(f0: float, phases: list[float], delay: float = 0.0) -> np.ndarray:
    """Harmonics of the same amplitude, with these phases in radians: samples [480 FRAMES]."""
    seconds = np.arange(480 * FRAMES) / 24000 - delay
    orders = np.arange(1, len(phases) + 1)[:, None]
    waves = np.cos(2 * np.pi * f0 * orders * seconds + np.array(phases)[:, None])
    return 0.1 * waves.sum(0).astype(np.float32)


def found(own: np.ndarray, other: np.ndarray, own_f0: float, other_f0: float, rows=BOTH) -> float:
    """The loss of two rows each."""
    own_track, other_track = (jnp.full((2, FRAMES), f0) for f0 in (own_f0, other_f0))
    return float(jax.jit(harmonic_phases.loss)(own, other, own_track, other_track, rows))


def expected(phases: list[float]) -> float:
    """The loss of such differences in phase, by every delay."""
    delays, orders = np.linspace(0, 2 * np.pi, 10_000), np.arange(1, len(phases) + 1)
    return 1 - np.cos(np.array(phases) - np.outer(delays, orders)).mean(1).max()


def test_a_delay_and_another_pitch_cost_nothing():
    phases = [0.3, -1.0, 2.0, 0.5]
    own = np.stack([voice(110, phases, delay) for delay in (0.0021, 0.0057)])
    other = np.stack([voice(123, phases)] * 2)
    assert found(own, other, 110, 123) < 0.02  # delays are tried in steps


@pytest.mark.parametrize("changes", [[0, 0, np.pi], [0, 1, -2, 3], [0, 2, 0, 2, 0, 2]])
def test_by_hand(changes):
    start = [0.3, -1.0, 2.0, 0.5, 0.1, -0.4][: len(changes)]
    own = np.stack([voice(120, list(np.add(start, changes)), delay) for delay in (0, 0.003)])
    other = np.stack([voice(120, start)] * 2)
    assert expected(changes) > 0.1
    assert found(own, other, 120, 120) == pytest.approx(expected(changes), abs=0.01)


def test_what_does_not_count():
    """Padding, frames without a voice in either signal, and harmonics above the highest one."""
    same, other = voice(120, [0.0, 1.0, 2.0]), voice(120, [0.0, -1.0, 1.5])
    first = jnp.array([True, False])
    assert found(np.stack([same, other]), np.stack([same] * 2), 120, 120, first) < 0.005
    assert found(np.stack([same, other]), np.stack([same] * 2), 120, 120) > 0.05
    assert found(np.stack([other] * 2), np.stack([same] * 2), 0, 120) == 0
    assert found(np.stack([other] * 2), np.stack([same] * 2), 120, 0) == 0
    high, turned = voice(390, [0.0, 0.0, 0.0, 0.0]), voice(390, [0.0, 0.0, 0.0, np.pi])
    assert found(np.stack([turned] * 2), np.stack([high] * 2), 390, 390) < 0.005


def test_its_gradient_finds_the_phases():
    """Descent on the samples themselves; one of the rows begins in silence."""
    other = np.stack([voice(120, [0.3, -1.0, 2.0, 0.5])] * 2)
    own = np.stack([voice(120, [1.0, 2.0, -1.0, 0.0]), np.zeros(480 * FRAMES, np.float32)])
    track = jnp.full((2, FRAMES), 120.0)

    @jax.jit
    def step(samples):
        value, grads = jax.value_and_grad(harmonic_phases.loss)(samples, other, track, track, BOTH)
        return value, samples - 0.05 * grads / jnp.abs(grads).max(1, keepdims=True)

    values = []
    for _ in range(60):
        value, own = step(own)
        values.append(float(value))
    assert np.isfinite(values).all() and values[-1] < values[0] / 4

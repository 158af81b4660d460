"""Repetition penalty, top-k and top-p by hand, and the frequencies of sampled tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.generate import sampling
from omni2_jax.generate.sampling import Sampling, penalize, sample, truncate


def kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The same by sorting, in float64."""
    ordered = np.sort(logits.astype(np.float64))[::-1]
    within = logits >= ordered[(top_k or len(logits)) - 1]
    probability = np.where(within, np.exp(logits.astype(np.float64) - ordered[0]), 0)
    probability /= probability.sum()
    above = np.array([probability[logits > value].sum() for value in logits])
    return (
        within & (np.isfinite(logits)) & ((above < top_p) | (logits == ordered[0]) | (top_p == 1))
    )


@pytest.mark.parametrize(
    ("bits", "few", "many"), [(1, 0, 0), (4, 10**4, 10**4), (2, 0, 10**4), (4, 0, 0)]
)
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (50, 1.0), (0, 0.9), (20, 0.5), (0, 0.01), (50, 0.0)]
)
def test_truncate(top_k, top_p, bits, few, many, monkeypatch):
    """few, many: from how many numbers on other ways are taken."""
    monkeypatch.setattr(sampling, "FEW", few)
    monkeypatch.setattr(sampling, "MANY", many)
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((4, 400))).astype(np.float32)
    logits[1, ::3] = logits[1, 0]  # many of the same
    logits[2, ::2] = -np.inf
    logits[3] = np.round(logits[3])  # zeros of both signs among them
    found = np.asarray(
        truncate(jnp.asarray(logits), jnp.full(4, top_k), jnp.full(4, top_p, jnp.float32), bits)
    )
    for row, expected in zip(range(4), (kept(row, top_k, top_p) for row in logits), strict=True):
        np.testing.assert_array_equal(found[row] > -np.inf, expected)
        np.testing.assert_array_equal(found[row][expected], logits[row][expected])


def test_penalize():
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0, -1.0], [2.0, -2.0, 0.0, 3.0, -1.0]])
    generated = jnp.array([[True, True, True, False, False], [False, True, False, True, True]])
    penalized = penalize(logits, generated, jnp.array([2.0, 1.0]))
    # 2 / 2, -2 * 2, 0, and two tokens that were not generated; a penalty of 1 is off.
    assert penalized.tolist() == [[1.0, -4.0, 0.0, 3.0, -1.0], logits[1].tolist()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_frequencies_of_sampled_tokens(settings, expected):
    """Chi-square of 20,000 draws: 16.3 is exceeded with a probability of 0.1 % (3 degrees)."""
    count, expected = 20_000, np.array(expected)
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (count, 1))
    keys = jax.random.split(jax.random.key(7), count)
    tokens = np.asarray(sample(logits, Sampling.of(count, **settings), keys))
    counts = np.bincount(tokens, minlength=4)
    possible = expected > 0
    assert counts.sum() == count and not counts[~possible].any()
    error = counts[possible] - count * expected[possible]
    assert np.sum(error**2 / (count * expected[possible])) < 16.3


def test_rows_have_settings_of_their_own():
    """A greedy row, and one whose penalty and top-k differ from its neighbour's."""
    logits = jnp.tile(jnp.array([1.0, 0.9, -5.0]), (3, 1))
    settings = Sampling(
        temperature=jnp.array([0.0, 1.0, 100.0]),
        top_p=jnp.ones(3),
        top_k=jnp.array([0, 1, 2]),
        repetition_penalty=jnp.ones(3),
    )
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(100))
    tokens = np.asarray(jax.vmap(lambda keys: sample(logits, settings, keys))(keys))
    assert not tokens[:, :2].any() and set(tokens[:, 2]) == {0, 1}

"""What top-k and top-p leave to be drawn from."""

import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.generate.sampling import truncate


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
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (50, 1.0), (0, 0.9), (20, 0.5), (0, 0.01), (50, 0.0)]
)
def test_truncate(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((4, 400))).astype(np.float32)
    logits[1, ::3] = logits[1, 0]  # many of the same
    logits[2, ::2] = -np.inf
    logits[3] = np.round(logits[3])  # zeros of both signs among them
    found = np.asarray(
        truncate(jnp.asarray(logits), jnp.full(4, top_k), jnp.full(4, top_p, jnp.float32))
    )
    for row, expected in zip(range(4), (kept(row, top_k, top_p) for row in logits), strict=True):
        np.testing.assert_array_equal(found[row] > -np.inf, expected)
        np.testing.assert_array_equal(found[row][expected], logits[row][expected])

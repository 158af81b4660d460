"""Comparisons of arrays and of trees of arrays. All tolerances are absolute."""

from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Assert equal shapes, and values that differ by `tolerance` at most."""
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def assert_wav(actual: ArrayLike, expected: np.ndarray, largest: float, rms: float) -> None:
    """Assert that the largest error and the root mean square of the errors are below two bounds."""
    error = np.abs(np.asarray(actual) - expected)
    assert error.max() < largest and np.sqrt(np.square(error).mean()) < rms


def assert_same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Assert that two trees hold the same arrays, up to `tolerance`."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected
    )


def tree_equal(a: Any, b: Any) -> bool:
    """True if two trees hold the same arrays bit for bit, NaN included; PRNG keys by their data."""

    def content(x) -> bytes:
        is_key = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    return jax.tree.all(jax.tree.map(lambda x, y: content(x) == content(y), a, b))

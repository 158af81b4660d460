"""Keys and values of a decoder: both forms of the cache, and how much of one is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax import sharding
from omni2_jax.config import DecoderConfig
from omni2_jax.models.kv_cache import KVCache, ListedKVCache, over_live

CONFIG = DecoderConfig(vocabulary=8, width=32, layers=2, heads=4, kv_heads=2, hidden=8)
CAPACITY = 16


def filled(kind, batch: int):
    """A cache of 10 positions in every row, and what is in it."""
    cache = kind.empty(CONFIG, batch, CAPACITY)
    keys, values = jax.random.normal(jax.random.key(0), (2, batch, 10, 2, 8))
    positions = jnp.tile(jnp.arange(10), (batch, 1)).at[0, 3].set(-1)  # padding: not written
    for layer in range(2):
        cache = cache.write(layer, positions, keys + layer, values - layer)
    return cache


@pytest.mark.parametrize("size", [10, CAPACITY])
def test_both_forms_attend_alike(size):
    """Queries at the last two positions, and at padding."""
    q = jax.random.normal(jax.random.key(1), (3, 3, 4, 8))
    positions = jnp.array([[8, 9, -1]] * 3)
    ours, stacked = (
        filled(kind, 3).attend(1, q, positions, size) for kind in (ListedKVCache, KVCache)
    )
    np.testing.assert_allclose(ours[:, :2], stacked[:, :2], atol=1e-6, rtol=0)


def test_a_mesh_that_cuts_the_heads():
    """The same numbers, and nothing is gathered."""
    mesh = sharding.make_mesh(1, 1, 2, jax.devices()[:2])
    cache, q = filled(ListedKVCache, 2), jax.random.normal(jax.random.key(1), (2, 1, 4, 8))

    def attend(cache):
        return cache.attend(1, q, jnp.full((2, 1), 9), CAPACITY)

    placed = jax.device_put(cache, sharding.of_state(jax.eval_shape(lambda: cache), mesh))
    with sharding.use(mesh):
        program = jax.jit(attend).lower(placed).compile()
    np.testing.assert_allclose(program(placed), attend(cache), atol=1e-6, rtol=0)
    assert "all-gather(" not in program.as_text()


def test_sizes():
    """One for few rows; for many the fewest eighths of the capacity that hold what is live."""
    assert ListedKVCache.empty(CONFIG, 2, CAPACITY).sizes() == (16,)
    assert ListedKVCache.empty(CONFIG, 8, CAPACITY).sizes() == (4, 6, 8, 12, 16)
    assert ListedKVCache.empty(CONFIG, 1, CAPACITY).sizes(first=5) == (5, 16)
    assert ListedKVCache.empty(CONFIG, 1, CAPACITY).sizes(first=20) == (16,)
    assert KVCache.empty(CONFIG, 8, CAPACITY).sizes(first=5) == (16,)


@pytest.mark.parametrize(("longest", "size"), [(1, 4), (4, 4), (5, 6), (13, 16), (20, 16)])
def test_the_smallest_size_that_holds_what_is_live(longest, size):
    cache = ListedKVCache.empty(CONFIG, 8, CAPACITY)
    ran = over_live(cache, jnp.array(longest), lambda size, carry: carry + size, jnp.int32(0))
    assert ran == size

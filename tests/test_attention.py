"""Causal attention without a mask over right-padded rows, and the mask of such rows."""

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.models import layers


def test_causal_attention_is_that_of_the_mask():
    """Rows of different lengths: what a position gives, and the gradients, are those of causal and
    padding masks together.
    """
    random, lengths, size = np.random.default_rng(0), np.array([9, 4, 1]), 9

    def draw(heads: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((3, size, heads, 8)), jnp.float32)

    q, k, v, weight = draw(4), draw(2), draw(2), draw(4)
    positions = np.where(np.arange(size) < lengths[:, None], np.arange(size), -1)
    mask = jnp.asarray(
        (positions[:, None, :] <= positions[:, :, None]) & (positions[:, None, :] >= 0)
    )[:, None]
    is_inside = jnp.asarray(positions >= 0)[..., None, None]

    def total(q, k, v, **options):
        y = jnp.where(is_inside, layers.attention(q, k, v, **options), 0)
        return jnp.sum(y * weight), y

    ours = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v, causal=True)
    by_mask = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v, mask=mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), ours, by_mask)


def test_inside():
    mask = layers.inside(jnp.array([0, 2, 5]), 4)
    assert mask.tolist() == [[False] * 4, [True, True, False, False], [True] * 4]

"""The decoder's family options: stated head size, norms of queries and keys, no query, key and
value biases.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.config import DecoderConfig
from omni2_jax.models.decoder import Decoder
from omni2_jax.models.kv_cache import KVCache
from tests.support.networks import abstract_model, fresh_model

SIZES = {
    "vocabulary": 50,
    "width": 24,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,  # heads * head_size is not the width
    "hidden": 32,
}
QWEN3 = DecoderConfig(**SIZES, qkv_bias=False, qk_norm=True, norm_eps=1e-30)
IDS = jnp.arange(14).reshape(2, 7)
POSITIONS = jnp.tile(jnp.arange(7), (2, 1))


def test_head_size():
    """Stated, or width // heads, as in the checkpoints that do not state it."""
    assert DecoderConfig(width=96, heads=6).head_size == 16
    assert DecoderConfig(width=96, heads=6, head_size=24).head_size == 24


def test_parameters_of_the_families():
    """Norms of queries and keys exist with `qk_norm`, biases with `qkv_bias`, in shapes by
    `head_size`.
    """
    _, qwen2 = abstract_model(Decoder, DecoderConfig(**SIZES))
    _, qwen3 = abstract_model(Decoder, QWEN3)
    attention = jax.tree.map(jnp.shape, qwen3["layers"]["attention"])
    assert attention == {
        "query": {"kernel": (2, 24, 4, 8)},
        "key": {"kernel": (2, 24, 2, 8)},
        "value": {"kernel": (2, 24, 2, 8)},
        "query_norm": {"scale": (2, 8)},
        "key_norm": {"scale": (2, 8)},
        "out": {"kernel": (2, 4, 8, 24)},
    }
    assert set(qwen2["layers"]["attention"]) == {"query", "key", "value", "out"}
    assert qwen2["layers"]["attention"]["key"]["bias"].shape == (2, 2, 8)


@pytest.fixture(scope="module")
def qwen3() -> Decoder:
    return nnx.merge(*fresh_model(lambda rngs: Decoder(QWEN3, rngs)))


def forward(decoder: Decoder) -> jax.Array:
    return nnx.jit(lambda d: d.logits(d(d.embed(IDS), POSITIONS)[0]))(decoder)


def test_queries_and_keys_are_normalized_per_head(qwen3):
    """The size of a head's queries does not matter; that of the norm's scale does."""
    expected = forward(qwen3)
    graph, params = nnx.split(qwen3)
    attention = params["layers"]["attention"]
    head_sizes = jnp.array([0.5, 1.0, 3.0, 10.0])[:, None]
    kernel = attention["query"]["kernel"]
    kernel.set_value(kernel[...] * head_sizes)
    np.testing.assert_allclose(forward(nnx.merge(graph, params)), expected, atol=1e-5, rtol=0)
    scale = attention["key_norm"]["scale"]
    scale.set_value(scale[...] * 3.0)
    assert np.abs(forward(nnx.merge(graph, params)) - expected).max() > 1e-2


def test_cached_steps_equal_one_pass(qwen3):
    """Prefill of 4 tokens, then one token a step, with a cache."""
    expected = forward(qwen3)

    @nnx.jit
    def step(decoder, ids, positions, cache):
        hidden, cache = decoder(decoder.embed(ids), positions, cache)
        return decoder.logits(hidden), cache

    cache = KVCache.empty(QWEN3, batch=2, capacity=16)
    assert cache.keys.shape == (2, 2, 16, 2, 8)
    logits, cache = step(qwen3, IDS[:, :4], POSITIONS[:, :4], cache)
    steps = [logits]
    for i in range(4, 7):
        logits, cache = step(qwen3, IDS[:, i : i + 1], POSITIONS[:, i : i + 1], cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), expected, atol=1e-5, rtol=0)

"""The forms of a model for CPUs, GPUs and TPUs give the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import sizes
from omni2_jax import sharding
from omni2_jax.checkpoint import parameters
from omni2_jax.generate import read_write
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import ReadWriteState, Request
from omni2_jax.models import kv_cache
from omni2_jax.models.flow import estimator
from omni2_jax.models.flow.mask import Chunks
from omni2_jax.models.flow.streaming import FlowState, StreamPlan, flow_step
from omni2_jax.models.forms import STACKED, for_serving, form_of
from omni2_jax.models.layers import Conv1d
from omni2_jax.models.model import abstract_model, abstract_state
from omni2_jax.sharding import make_mesh

CONFIG = sizes.TINY.replace(
    speaker=None,
    speech_encoder=None,
    adapter=None,
    vocoder=None,
    flow=dataclasses.replace(sizes.TINY.flow, up_layers=2),
)


@pytest.fixture(scope="module")
def stacked():
    """A model as it is read from a checkpoint, with random weights."""
    graph, shapes = abstract_model(CONFIG)
    return graph, parameters.unflatten(shapes, sizes.random(parameters.flatten(shapes)))


def language(graph, params, listed: bool) -> tuple:
    """Two reads and writes of two slots behind prompts of 5 and 3 tokens -> tokens and state."""
    request = Request.of(CONFIG, Options(unit_temperature=0, max_new_tokens=20), text_eos=())
    state = ReadWriteState.empty(CONFIG, 2, 64, 64, listed=listed)
    request = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), request)

    @jax.jit
    def run(params, state):
        model = nnx.merge(graph, params)
        ids = jnp.arange(10).reshape(2, 5)
        features = jnp.zeros((2, 1, CONFIG.llm.width))
        state = read_write.prefill(
            model,
            state,
            ids=ids,
            lengths=jnp.array([5, 3]),
            features=features,
            request=request,
        )

        def step(state, _):
            return read_write.read_write(model, state)

        return jax.lax.scan(step, state, None, 2)

    state, output = run(params, state)
    return output, state.hidden


def flow(graph, params) -> jax.Array:
    """Two writes of two streams, the second of which ends the first stream -> mel."""
    plan = StreamPlan.of(CONFIG.flow, 4, Chunks(4, 1), bucketed=False)

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params).flow
        state = FlowState.empty(model, jnp.ones((2, CONFIG.flow.mels)), plan)
        units = jnp.arange(8).reshape(2, 4)
        mels = []
        for final in (jnp.array([False, False]), jnp.array([True, False])):
            state, mel, _ = flow_step(model, state, units, jnp.array([4, 3]), final)
            mels.append(mel)
        return jnp.stack(mels)

    return run(params)


def test_language_models(stacked, monkeypatch):
    """Caches are read up to one of two sizes, as with many slots."""
    monkeypatch.setattr(kv_cache, "FEW_ROWS", 2)
    monkeypatch.setattr(kv_cache, "EIGHTHS", (3, 8))
    form = form_of("gpu")
    expected, hidden = language(*stacked, False)
    output, ours = language(*for_serving(*stacked, form), form.listed_caches)
    np.testing.assert_array_equal(output.text_tokens, expected.text_tokens)
    np.testing.assert_array_equal(output.speech_tokens, expected.speech_tokens)
    np.testing.assert_allclose(ours, hidden, atol=1e-5, rtol=0)


def test_flow(stacked, monkeypatch):
    """The same mel in float32, and one that is close with matmuls in bfloat16.

    The heads' outputs are added up one by one, and with many frames by the matmul.
    """
    forms = STACKED, dataclasses.replace(form_of("gpu"), flow_matmuls="float32"), form_of("gpu")
    expected, mel, rounded = (flow(*for_serving(*stacked, form)) for form in forms)
    assert jnp.abs(expected).max() > 0.01
    np.testing.assert_allclose(mel, expected, atol=1e-5, rtol=0)
    assert 0 < jnp.abs(rounded - expected).mean() < 1e-3 < jnp.abs(expected).mean()
    monkeypatch.setattr(estimator, "MANY_FRAMES", 0)
    np.testing.assert_allclose(flow(*for_serving(*stacked, forms[1])), expected, atol=1e-5, rtol=0)


def test_forms(stacked):
    """Matrices are joined on one GPU, not where a mesh cuts them; a TPU's model stays as it is."""
    graph, params = stacked
    assert for_serving(graph, params, form_of("tpu"))[1] is params
    _, joined = for_serving(graph, params, form_of("gpu"))
    attention = joined["llm"]["layers"][1]["attention"]
    assert attention["fused"]["kernel"].shape == (4 + 2 * 2, 16, 64)  # [out, in]
    np.testing.assert_array_equal(
        attention["fused"]["bias"][4:6], params["llm"]["layers"]["attention"]["key"]["bias"][1]
    )
    stage, config = joined["flow"]["estimator"]["down"], CONFIG.flow
    joined_conv = stage["conv1"]["conv"]["kernel"]  # [C_out, K, C_in], with the skip connection
    assert joined_conv.shape == (2 * config.channels, 3, 4 * config.mels)
    cut = form_of("gpu", make_mesh(1, 1, 2, jax.devices()[:2]))
    assert cut == dataclasses.replace(form_of("gpu"), fused=False, search_bits=1)


def test_transposed_convolution():
    """It gives the same numbers, and the old kernel is deleted."""
    conv = Conv1d(nnx.Rngs(0), (3, 4, 12), dilation=2, padding=(2, 2), groups=2)
    x = jax.random.normal(jax.random.key(1), (2, 7, 8))
    expected, old = conv(x), conv.kernel[...]
    conv.transpose(donate=True)
    assert conv.kernel.shape == (12, 3, 4) and old.is_deleted()
    np.testing.assert_allclose(conv(x), expected, atol=1e-6, rtol=0)


def test_donated_parameters():
    """What was replaced is deleted, and nothing else; on a mesh all keep their places."""
    mesh = make_mesh(1, 2, 1, jax.devices()[:2])
    graph, state = abstract_state(CONFIG.only("llm"))
    shardings = parameters.flatten(sharding.of_params(state, mesh))
    params = sizes.random(parameters.flatten(nnx.to_pure_dict(state)), shardings)
    nested = parameters.unflatten(nnx.to_pure_dict(state), params)
    graph, new = for_serving(graph, nested, form_of("gpu", mesh), donate=True)
    deleted = {path for path, leaf in params.items() if leaf.is_deleted()}
    assert deleted == {path for path in params if path.startswith("llm.layers.")}
    places = sharding.of_params(nnx.state(nnx.merge(graph, new)), mesh)
    for leaf, place in zip(*map(jax.tree.leaves, (new, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)

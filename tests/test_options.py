"""Ranges of the options, their way into a request, and the settings that an engine is made for."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from omni2_jax.generate.options import LIMITS, OPTIONAL, Options
from omni2_jax.generate.read_write_state import Request
from omni2_jax.models.vocoder.hift_streaming import StreamingHift
from tests.support.conversations import GREEDY


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    """Both bounds are accepted; what is beyond them, NaN, and no number at all are not."""
    low, high = LIMITS[name]
    for value in (low, high):
        assert getattr(Options(**{name: value}), name) == value
    wrong = [low - 1, high + 1, 10**30, -(10**30), 2**63, float("nan"), float("inf"), "1", True]
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name} is .*, expected an? .* from {low} to"):
            Options(**{name: value})
    if name not in OPTIONAL:
        with pytest.raises(ValueError, match=f"{name} is None"):
            Options(**{name: None})
    if isinstance(low, int):
        with pytest.raises(ValueError, match="expected an integer"):
            Options(**{name: low + 0.5})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("unit_vocabulary", "x", "'units' or 'all'"),
        ("flow_cache_dtype", "int8", "'float32' or 'bfloat16'"),
        ("long_turns", "cut", "'refuse' or 'truncate' or 'split'"),
        ("seamless", "yes", "True or False"),
    ],
)
def test_choices(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected {expected}"):
        Options(**{name: value})


def test_largest_values_as_arrays(text_model):
    """No upper bound overflows JAX's 32-bit integers."""
    largest = {name: high for name, (_, high) in LIMITS.items()}
    request = Request.of(text_model.config, Options(**largest))
    assert request.text.top_k[0] == request.unit.top_k[0] == 1_000_000
    assert request.max_text[0] == 8192 and request.max_flush[0] == 16_384
    other = Request.of(text_model.config, Options(**(largest | {"seed": 0})))
    assert request.key[0] != other.key[0]


def test_defaults_of_the_release(text_model):
    """generation_config.json decides what the options leave open; null there means off."""
    model = copy.copy(text_model)
    model.defaults = {"top_p": 0.8, "top_k": None, "repetition_penalty": 1.1, "temperature": 0.7}
    text = model.request(Options(top_p=0.5)).text
    assert (text.top_p[0], text.top_k[0], text.temperature[0]) == (0.5, 0, 0)
    assert text.repetition_penalty[0] == jnp.float32(1.1)


def test_how_units_are_sampled(text_model):
    """As in the paper; another checkpoint may say otherwise, and the options before both."""
    model = copy.copy(text_model)

    def unit(options: Options, **defaults: float) -> tuple[float, int]:
        model.defaults = defaults
        found = model.request(options).unit
        return float(found.temperature[0]), int(found.top_k[0])

    assert unit(Options()) == (1, 50)
    assert unit(Options(), unit_temperature=0.5, unit_top_k=9) == (0.5, 9)
    assert unit(Options(unit_temperature=0, unit_top_k=0), unit_temperature=0.5) == (0, 0)


def test_too_many_end_tokens(text_model):
    with pytest.raises(ValueError, match="9 end-of-text tokens given, at most 8"):
        Request.of(text_model.config, Options(), text_eos=range(9))


@pytest.fixture
def engines(model):
    """The model without the engines of other tests."""
    model = copy.copy(model)
    model.engines = {}
    return model


def test_flow_cache_dtype_reaches_the_engine(engines):
    """A flow cache in bfloat16 has half the bytes."""
    sizes = {}
    for name in ("float32", "bfloat16"):
        engine = engines.engine(dataclasses.replace(GREEDY, flow_cache_dtype=name), 1000)
        pairs = engine.state.flow.cache.estimator.kv.pairs
        assert engine.engine_config.flow_cache_dtype == name == pairs.dtype.name
        sizes[name] = pairs.nbytes
    assert 2 * sizes["bfloat16"] == sizes["float32"] > 0


def test_the_flow_cache_is_no_longer_than_the_answer(engines):
    """1000 chunks of 10 units would be 10,000 units; an answer here has 1280 at most."""
    engine = engines.engine(dataclasses.replace(GREEDY, left_chunks=1000), 1000)
    assert engine.engine_config.flow_left_chunks == 128
    assert engine.state.flow.plan.capacity == 1290


@pytest.mark.slow
def test_seamless_reaches_the_vocoder(engines, monkeypatch):
    passed, step = [], StreamingHift.step

    def record(*arguments):
        passed.append(arguments[-1])
        return step(*arguments)

    monkeypatch.setattr(StreamingHift, "step", record)
    for seamless in (True, False):
        engine = engines.engine(dataclasses.replace(GREEDY, seamless=seamless), 1000)
        jax.eval_shape(engine.programs.step, engine.params, engine.state)
    assert passed == [True, False]

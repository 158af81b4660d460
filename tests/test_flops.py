"""What a step costs, against the matmuls and convolutions in what is traced of it, and by hand."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from benchmarks.sizes import SIZES
from omni2_jax import sharding
from omni2_jax.config import Omni2Config
from omni2_jax.models import stacks
from omni2_jax.train import flops
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages import flow, stage_of
from omni2_jax.train.step import SingleObjective
from omni2_jax.train.weights import Weights, split_params, stage_weights

TINY = SIZES["tiny"]


def counted(jaxpr: Jaxpr) -> int:
    """FLOPs of all matmuls and convolutions, those in a scan as often as it runs them."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            out, right = math.prod(eqn.outvars[0].aval.shape), eqn.invars[1].aval.shape
            if eqn.primitive.name == "dot_general":
                summed = math.prod(right[axis] for axis in eqn.params["dimension_numbers"][0][1])
            else:
                summed = math.prod(right) // right[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out * summed
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        inner = sum(
            counted(getattr(jaxpr, "jaxpr", jaxpr))
            for jaxpr in inner
            if isinstance(jaxpr, ClosedJaxpr | Jaxpr)
        )
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def traced(train: TrainConfig, config: Omni2Config = TINY) -> SimpleNamespace:
    """FLOPs of a stage's loss and gradients: counted in the traced program, and by train.flops."""
    stage, (bucket,) = stage_of(train), train.buckets
    weights = stage_weights(stage, config, sharding.make_mesh(devices=jax.devices()[:1]))
    trained, frozen = split_params(stage, weights.shapes)
    row = stage.example_type(train, config, None, None).empty(bucket)
    batch = {
        name: jax.ShapeDtypeStruct((1, train.batch, *leaf.shape), leaf.dtype)
        for name, leaf in row.items()
    }
    objective = SingleObjective(stage, weights, 1)

    def trace(run: Callable, *more) -> int:
        return counted(jax.make_jaxpr(run)(trained, frozen, batch, *more).jaxpr)

    def condition(params, frozen, batch):
        microbatch = jax.tree.map(lambda leaf: leaf[0], batch)
        return flow.condition(weights.model(params, frozen), microbatch)

    by_part = stage.flops(config, weights.shapes, bucket)
    return SimpleNamespace(
        forward=trace(objective.validate),
        both=trace(objective.gradients, jax.eval_shape(lambda: jax.random.key(0))),
        counted_forward=sum(forward for forward, _ in by_part.values()),
        counted_both=flops.step(stage, config, weights.shapes, bucket),
        voice=trace(condition) if train.stage == "flow" else 0,
    )


def sized(stage: str, bucket: Bucket, **changes) -> TrainConfig:
    return TrainConfig(
        stage, batch=2, buckets=(bucket,), dtype="float32", remat="none", loss_block=4096, **changes
    )


def log_mel(clips: int, frames: int = 1500) -> int:
    return 2 * clips * 2 * frames * 201 * TINY.speech_encoder.mels


def masked(llm, rows: int, time: int) -> int:
    """The masked half of causal attention, which is computed but not counted."""
    return 2 * rows * llm.layers * llm.width * time**2


def logits(llm, rows: int) -> int:
    """The logits of the loss, which the backward pass computes a second time."""
    return 2 * rows * llm.vocabulary * llm.width


@pytest.mark.parametrize("rank", [0, 4])
def test_text_stage(rank):
    result, half = traced(sized("1a", Bucket(2, 640), rank=rank)), masked(TINY.llm, 2, 640)
    assert result.counted_forward == result.forward - log_mel(4) - half
    assert result.counted_both == result.both - log_mel(4) - 3 * half - logits(TINY.llm, 2 * 640)


def test_shorter_window():
    """An encoder with a window of 5 s: 50 positions of the LLM for each clip."""
    short = TINY.replace(speech_encoder=dataclasses.replace(TINY.speech_encoder, frames=250))
    result = traced(sized("1a", Bucket(2, 140)), short)
    expected = result.forward - log_mel(4, frames=250) - masked(TINY.llm, 2, 140)
    assert result.counted_forward == expected


def test_unit_stage():
    result, half = traced(sized("1b", Bucket(0, 0, 64))), masked(TINY.speech_lm, 2, 64)
    assert result.counted_forward == result.forward - half
    assert result.counted_both == result.both - 3 * half - logits(TINY.speech_lm, 2 * 64)


def test_speech_stage():
    result, frozen, half = (
        traced(sized("2", Bucket(2, 640, 64))),
        masked(TINY.llm, 2, 640),
        masked(TINY.speech_lm, 4, 64),
    )
    assert result.counted_forward == result.forward - log_mel(4) - frozen - half
    assert result.counted_both == result.both - log_mel(4) - frozen - 3 * half - logits(
        TINY.speech_lm, 4 * 64
    )


def test_flow(monkeypatch):
    """Without what is computed once a recording, as the embedding of time; so within 0.4 %."""
    monkeypatch.setitem(stacks.REMAT, "full", stacks.REMAT["none"])
    result = traced(sized("flow", Bucket(0, 0, 64)))
    np.testing.assert_allclose(result.counted_forward, result.forward - result.voice, rtol=4e-3)
    np.testing.assert_allclose(result.counted_both, result.both - result.voice, rtol=4e-3)


def test_by_hand():
    """The released speech LM on one reply of 1000 tokens: three passes of its 494 M weights, which
    include the tied output matrix, and of its attention.
    """
    train, config = sized("1b", Bucket(0, 0, 1000)), SIZES["0.5b"].only("speech_lm")
    shapes = Weights.of(config, sharding.make_mesh(devices=jax.devices()[:1])).shapes
    layer = 896 * (896 + 2 * 128 + 896 + 3 * 4864)
    weights, attention = 24 * layer + 158227 * 896, 24 * 2 * 1000 * 896 * 1000
    assert flops.step(stage_of(train), config, shapes, train.buckets[0]) == 2 * 3 * (
        2 * 1000 * weights + attention
    )

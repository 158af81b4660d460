"""What a step costs, against the matmuls and convolutions in what is traced of it, and by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from benchmarks.sizes import SIZES
from omni2_jax import sharding
from omni2_jax.models import layers
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


def traced(train: TrainConfig) -> SimpleNamespace:
    """FLOPs of a stage's loss and of its gradients, counted in both ways; of its features, in one."""
    stage, (bucket,) = stage_of(train), train.buckets
    weights = stage_weights(stage, TINY, sharding.make_mesh(devices=jax.devices()[:1]))
    trained, frozen = split_params(stage, weights.shapes)
    row = stage.example_type(train, TINY, None, None).empty(bucket)
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

    by_part = stage.flops(TINY, weights.shapes, bucket)
    return SimpleNamespace(
        forward=trace(objective.validate),
        both=trace(objective.gradients, jax.eval_shape(lambda: jax.random.key(0))),
        ours_forward=sum(forward for forward, _ in by_part.values()),
        ours_both=flops.step(stage, TINY, weights.shapes, bucket),
        voice=trace(condition) if train.stage == "flow" else 0,
    )


def sized(stage: str, bucket: Bucket, **changes) -> TrainConfig:
    return TrainConfig(
        stage, batch=2, buckets=(bucket,), dtype="float32", remat="none", loss_block=4096, **changes
    )


def log_mel(clips: int) -> int:
    return 2 * clips * 3000 * 201 * TINY.speech_encoder.mels


def unseen(llm, rows: int, time: int) -> int:
    """The half of causal attention that is computed and thrown away."""
    return 2 * rows * llm.layers * llm.width * time**2


def logits(llm, rows: int) -> int:
    """Of the loss, which computes them a second time to go back through them."""
    return 2 * rows * llm.vocabulary * llm.width


@pytest.mark.parametrize("rank", [0, 4])
def test_text_stage(rank):
    found, half = traced(sized("1a", Bucket(2, 640), rank=rank)), unseen(TINY.llm, 2, 640)
    assert found.ours_forward == found.forward - log_mel(4) - half
    assert found.ours_both == found.both - log_mel(4) - 3 * half - logits(TINY.llm, 2 * 640)


def test_unit_stage():
    found, half = traced(sized("1b", Bucket(0, 0, 64))), unseen(TINY.speech_lm, 2, 64)
    assert found.ours_forward == found.forward - half
    assert found.ours_both == found.both - 3 * half - logits(TINY.speech_lm, 2 * 64)


def test_speech_stage():
    found, frozen, half = (
        traced(sized("2", Bucket(2, 640, 64))),
        unseen(TINY.llm, 2, 640),
        unseen(TINY.speech_lm, 4, 64),
    )
    assert found.ours_forward == found.forward - log_mel(4) - frozen - half
    assert found.ours_both == found.both - log_mel(4) - frozen - 3 * half - logits(
        TINY.speech_lm, 4 * 64
    )


def test_flow(monkeypatch):
    """But for what is computed once a recording, such as the embedding of time, and for what is computed twice."""
    monkeypatch.setitem(layers.REMAT, "full", layers.REMAT["none"])
    found = traced(sized("flow", Bucket(0, 0, 64)))
    np.testing.assert_allclose(found.ours_forward, found.forward - found.voice, rtol=4e-3)
    np.testing.assert_allclose(found.ours_both, found.both - found.voice, rtol=4e-3)


def test_by_hand():
    """The speech LM of the release on one reply of 1000 tokens: 494 M weights, its tied head among them, thrice, and attention."""
    train, config = sized("1b", Bucket(0, 0, 1000)), SIZES["0.5b"].only("speech_lm")
    shapes = Weights.of(config, sharding.make_mesh(devices=jax.devices()[:1])).shapes
    layer = 896 * (896 + 2 * 128 + 896 + 3 * 4864)
    weights, attention = 24 * layer + 158227 * 896, 24 * 2 * 1000 * 896 * 1000
    assert flops.step(stage_of(train), config, shapes, train.buckets[0]) == 2 * 3 * (
        2 * 1000 * weights + attention
    )

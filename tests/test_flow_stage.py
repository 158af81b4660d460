"""Stage "flow" from nothing, for one voice: the encoder alone, then the estimator; and the mel's
statistics in the config.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.checkpoint import parameters, voices
from omni2_jax.config import FlowConfig, Omni2Config
from omni2_jax.configs import flow
from omni2_jax.models.flow.matching import Flow, Prompt
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig
from omni2_jax.train.stages import stage_of
from tests.support.compare import tree_equal
from tests.support.networks import fresh_model
from tests.support.runs import reported, saved_state, train

SMALL = FlowConfig(
    width=32,
    heads=2,
    hidden=32,
    layers=1,
    up_layers=1,
    speaker=1,
    mel_mean=-4.6,
    mel_std=2.7,
    chunk=10,
    channels=16,
    estimator_heads=2,
    estimator_head_size=8,
    blocks=1,
    mid_blocks=1,
    steps=2,
    noise_frames=200,
)
MU_STEPS, STEPS = 40, 100


@dataclasses.dataclass
class Parts:
    """As much of a model as the stage uses."""

    flow: Flow


def fresh(config: FlowConfig) -> tuple[nnx.GraphDef, dict]:
    return fresh_model(lambda rngs: Flow(config, rngs))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint of a small flow alone, with fresh parameters."""
    out = tmp_path_factory.mktemp("start")
    parameters.save_part(out, "flow", parameters.flatten(fresh(SMALL)[1]))
    Omni2Config(flow=SMALL).only("flow").save(out / "config.json")
    return out


@pytest.fixture(scope="module")
def settings(start, talks) -> TrainConfig:
    return dataclasses.replace(
        flow.config,
        checkpoint=str(start),
        data=str(talks),
        one_voice=True,
        mu_steps=MU_STEPS,
        batch=3,
        steps=STEPS,
        optimizer=OptimizerConfig(peak=1e-2, beta2=0.99),
        buckets=(Bucket(0, 0, 40),),
        chunks=(),
        remat="none",
        workers=1,
        save_every=20,
        keep=9,
    )


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    return train(settings, tmp_path_factory.mktemp("runs") / "straight")


@pytest.mark.slow
def test_both_phases_learn(trained):
    """The encoder's error falls by a third while the estimator stays as it was; then its loss."""
    losses = list(reported(trained).values())
    assert np.mean(losses[MU_STEPS - 5 : MU_STEPS]) < 2 / 3 * np.mean(losses[:3])
    assert np.mean(losses[-10:]) < 2 / 3 * np.mean(losses[MU_STEPS : MU_STEPS + 3])
    before, between, after = (
        saved_state(trained, step)["params"] for step in (20, MU_STEPS, STEPS)
    )
    for path in before:
        in_encoder = path.startswith(("flow.embed", "flow.encoder", "flow.project"))
        assert np.array_equal(before[path], between[path]) == (not in_encoder), path
        assert not np.array_equal(between[path], after[path]), path


@pytest.mark.slow
@pytest.mark.parametrize("step", [80, pytest.param(20, marks=pytest.mark.nightly)])
def test_resumed(settings, trained, tmp_path, step):
    """Killed in either phase, it ends with the same state to the bit."""
    cut = shutil.copytree(trained, tmp_path / "cut", ignore=shutil.ignore_patterns("final"))
    for path in (cut / "steps").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    train(settings, cut)
    assert tree_equal(saved_state(cut, STEPS), saved_state(trained, STEPS))
    assert reported(cut) == reported(trained)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_recomputation(settings, start, remat):
    """The backward pass of both losses recomputes blocks unless the setting says "none"."""
    stage = stage_of(dataclasses.replace(settings, remat=remat))
    graph, params = fresh(SMALL)
    batch = {
        "units": jnp.zeros((1, 10), jnp.int32),
        "audio_24k": jnp.zeros((1, 9600), jnp.int16),
    }

    def traced(loss) -> str:
        def of_params(params):
            return loss(Parts(nnx.merge(graph, params)), batch, jax.random.key(0))[0]

        return str(jax.make_jaxpr(of_params)(params))

    for loss in (stage.loss, stage.mu_loss):
        assert ("remat" in traced(loss)) == (remat == "full")


@pytest.mark.slow
def test_mel_statistics():
    """A flow with statistics gives the mel of the same flow without them, scaled and shifted."""
    plain = dataclasses.replace(SMALL, mel_mean=0.0, mel_std=1.0)
    params = fresh(SMALL)[1]
    units, lengths = jnp.arange(12)[None], jnp.array([12])
    mel = 3 * jax.random.normal(jax.random.key(1), (1, 8, 80)) - 4
    results = []
    for config, prompt in ((SMALL, mel), (plain, (mel + 4.6) / 2.7)):
        graph, _ = fresh(config)

        @jax.jit
        def run(params, prompt, graph=graph):
            model = nnx.merge(graph, params)
            begin = Prompt(jnp.arange(4)[None], prompt, jnp.array([4]))
            return model(units, lengths, model.voice(jnp.ones((1, 1))), prompt=begin)[0]

        results.append(run(params, prompt))
    np.testing.assert_allclose(results[0], results[1] * 2.7 - 4.6, atol=1e-4)


def test_the_one_voice(start, settings, checkpoint_dir, tmp_path):
    """Its x-vector needs no speaker encoder and has no name; checkpoint and setting must agree."""
    config = Omni2Config.load(start / "config.json")
    np.testing.assert_array_equal(voices.resolve(start, config, None), [1])
    with pytest.raises(ValueError, match=r"voice 'jane': the flow of .* has one voice; name none$"):
        voices.resolve(start, config, "jane")
    for checkpoint, one_voice, says in (
        (checkpoint_dir, True, "flow.speaker of the checkpoint is 192, expected 1"),
        (start, False, "lacks speaker, which stage flow needs"),
    ):
        changed = dataclasses.replace(settings, checkpoint=str(checkpoint), one_voice=one_voice)
        with pytest.raises(ValueError, match=says):
            Run(changed, tmp_path / "run")

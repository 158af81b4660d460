"""The registry of stages, and a stage with a model and two optimizers of its own."""

import shutil

import numpy as np
import pytest

from omni2_jax.checkpoint import parameters
from omni2_jax.train import stages
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages.base import Stage
from tests.support.compare import tree_equal
from tests.support.runs import reported, saved_state, toy_config, train

TOY_GAN = "tests.support.gan_stage:ToyGan"


@pytest.mark.parametrize("name", stages.STAGES)
def test_registered_stages(name):
    stage = stages.stage_of(TrainConfig(name))
    assert isinstance(stage, Stage) and set(stage.trained) <= set(stage.parts)
    assert set(stage.loaded) <= set(stage.parts)


@pytest.fixture
def settings(checkpoint_dir, talks, monkeypatch) -> TrainConfig:
    """Settings of the toy GAN, which is registered with one line."""
    monkeypatch.setitem(stages.STAGES, "gan", TOY_GAN)
    sizes = {"steps": 8, "save_every": 2, "keep": 9, "validation": str(talks), "validate_every": 4}
    return toy_config(TrainConfig("gan"), checkpoint_dir, talks, samples=0, **sizes)


@pytest.mark.slow
def test_two_optimizers(settings, checkpoint_dir, tmp_path):
    """A run that is resumed after four steps is equal to an uninterrupted one; the critic is not
    exported.
    """
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(settings, straight)
    shutil.copytree(straight, cut, ignore=shutil.ignore_patterns("final"))
    for step in ("6", "8"):
        shutil.rmtree(cut / "steps" / step)
    train(settings, cut)
    for name in ("loss", "critic_loss"):
        assert list(reported(cut, name)) == list(range(8))
        assert reported(cut, name) == reported(straight, name)
    assert reported(cut, "validation_loss") == reported(straight, "validation_loss")
    assert tree_equal(saved_state(cut, 8), saved_state(straight, 8))

    before, after = (saved_state(straight, step) for step in (2, 8))
    assert {path.partition(".")[0] for path in after["generator"]} == {"fusion"}
    assert {path.partition(".")[0] for path in after["critic"]} == {"critic"}
    for group in ("generator", "critic"):
        assert not any(np.array_equal(before[group][p], after[group][p]) for p in after[group])

    final = straight / "final"
    assert parameters.parts(final) == parameters.parts(checkpoint_dir)
    assert not (final / "params" / "critic").exists()
    assert (final / "config.json").read_bytes() == (checkpoint_dir / "config.json").read_bytes()
    for part in parameters.parts(final):
        ours, started = (
            {path: leaf.read() for path, leaf in parameters.stored(directory, part).items()}
            for directory in (final, checkpoint_dir)
        )
        assert tree_equal(ours, started) == (part != "fusion")
    exported = parameters.stored(final, "fusion")
    for path, leaf in exported.items():
        np.testing.assert_array_equal(leaf.read(), after["generator"][f"fusion.{path}"])

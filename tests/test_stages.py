"""The registry of stages, and a stage with a model and two optimizers of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni2_jax.checkpoint import parameters
from omni2_jax.train import stages
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages.base import Stage
from tests.support.compare import tree_equal
from tests.support.paths import ROOT
from tests.support.runs import reported, toy_config

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


def state(run: Path, step: int) -> dict:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore((run / "steps" / str(step) / "default").absolute())


def train_and_die(settings: TrainConfig, out: Path) -> None:
    """Run the same training in a process that is killed when it is about to save step 6."""
    code = f"""
import os, signal
from pathlib import Path
import jax
from omni2_jax.train import checkpoints, loop, stages
from omni2_jax.train.settings import *
stages.STAGES["gan"] = {TOY_GAN!r}
save = checkpoints.Checkpoints.save
def save_or_die(self, state, step):
    if step == 6:
        self.manager.wait_until_finished()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, state, step)
checkpoints.Checkpoints.save = save_or_die
loop.Run({settings!r}, Path({str(out)!r}), jax.devices()[:1]).go()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=300)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_two_optimizers(settings, checkpoint_dir, tmp_path):
    """A killed and resumed run is equal to an uninterrupted one; the critic is not exported."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = Run(settings, straight, jax.devices()[:1])
    run.go()
    train_and_die(settings, killed)
    assert [path.name for path in sorted((killed / "steps").iterdir())] == ["2", "4"]
    Run(settings, killed, jax.devices()[:1]).go()
    for name in ("loss", "critic_loss"):
        assert list(reported(killed, name)) == list(range(8))
        assert reported(killed, name) == reported(straight, name)
    assert reported(killed, "validation_loss") == reported(straight, "validation_loss")
    assert tree_equal(state(killed, 8), state(straight, 8))

    before, after = state(straight, 2), state(straight, 8)
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

"""Training over a mesh of 8 devices: the losses of one device, and a run that moves from one mesh to another."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from omni2_jax.train.loop import Run
from omni2_jax.train.settings import MeshConfig, TrainConfig
from tests.support.runs import losses, toy_run

MESHES = {
    "8x1": (1, 8, 1),
    "1x8": (1, 1, 8),
    "2x4": (1, 2, 4),
    "2x2x2": (2, 2, 2),
}  # replica, fsdp, tensor


@pytest.fixture(scope="module")
def settings(checkpoint_dir, talks) -> TrainConfig:
    return toy_run(checkpoint_dir, talks)


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """The run of one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    Run(settings, out, jax.devices()[:1]).go()
    return out


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_on_a_mesh(settings, alone, tmp_path, mesh):
    """And what every device holds of the state is its share."""
    run = Run(dataclasses.replace(settings, mesh=MeshConfig(*MESHES[mesh])), tmp_path / "run")
    run.go()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=0, atol=1e-4)
    kernel = run.weights.shardings["speech_lm.layers.mlp.up.kernel"]
    assert dict(kernel.mesh.shape) == dict(
        zip(("replica", "fsdp", "tensor"), MESHES[mesh], strict=True)
    )


def test_run_taken_up_on_another_mesh(settings, alone, tmp_path):
    """Two steps on one device, the others on 2x4."""
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "steps" / "4")
    Run(dataclasses.replace(settings, mesh=MeshConfig(1, 2, 4)), tmp_path / "run").go()
    found = losses(tmp_path / "run")
    assert found[:2] == losses(alone)[:2]
    np.testing.assert_allclose(found[2:], losses(alone)[2:], rtol=0, atol=1e-5)

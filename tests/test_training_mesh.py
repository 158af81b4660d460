"""Training on meshes of 8 devices: the losses are those of one device, also if a run moves."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from omni2_jax.train.loop import Run
from omni2_jax.train.settings import MeshConfig, TrainConfig
from tests.support.meshes import MESH_PARAMS
from tests.support.runs import losses, toy_run


@pytest.fixture(scope="module")
def settings(checkpoint_dir, talks) -> TrainConfig:
    return toy_run(checkpoint_dir, talks)


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """A run on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    Run(settings, out, jax.devices()[:1]).go()
    return out


@pytest.mark.parametrize("mesh", MESH_PARAMS)
def test_steps_on_a_mesh(settings, alone, tmp_path, mesh):
    """The losses are those of one device; the parameters lie on the mesh of the settings."""
    run = Run(dataclasses.replace(settings, mesh=MeshConfig(*mesh)), tmp_path / "run")
    run.go()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=0, atol=1e-4)
    kernel = run.weights.shardings["speech_lm.layers.mlp.up.kernel"]
    assert dict(kernel.mesh.shape) == dict(zip(("replica", "fsdp", "tensor"), mesh, strict=True))


@pytest.mark.slow
def test_from_one_device_to_eight(settings, alone, tmp_path):
    """Two steps on one device, the others on 2x4, with the default eps of Adam.

    .ci/run takes no other steps on this mesh.
    """
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "steps" / "4")
    Run(dataclasses.replace(settings, mesh=MeshConfig(1, 2, 4)), tmp_path / "run").go()
    moved = losses(tmp_path / "run")
    assert moved[:2] == losses(alone)[:2]
    np.testing.assert_allclose(moved[2:], losses(alone)[2:], rtol=0, atol=1e-5)

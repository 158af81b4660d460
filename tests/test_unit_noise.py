"""The speech LM learns to go on after wrong units: `unit_noise` in stages 1b and 2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.config import Omni2Config
from omni2_jax.configs import stage1b, stage2
from omni2_jax.train.examples import PAD
from omni2_jax.train.stages import stage_of
from omni2_jax.train.stages.text_to_speech import noisy_units

CONFIG = Omni2Config()
FIRST = CONFIG.tokens.sep + 1  # the first unit


def test_only_units_are_replaced():
    """Text, <sep>, the end and padding stay; the share of the units is the one asked for."""
    others = jnp.array([PAD, 5, CONFIG.tokens.sep, CONFIG.tokens.unit_eos])
    units = jnp.full((50, 100), FIRST + 7)
    tokens = jnp.concatenate([jnp.broadcast_to(others, (50, 4)), units], axis=1)
    noisy = np.asarray(noisy_units(tokens, 0.2, CONFIG, jax.random.key(0)))
    assert (noisy[:, :4] == others).all() and noisy.dtype == tokens.dtype
    changed = noisy[:, 4:][noisy[:, 4:] != FIRST + 7]
    assert 0.17 < changed.size / units.size < 0.23
    assert changed.min() >= FIRST and changed.max() < FIRST + CONFIG.units
    assert len(np.unique(changed)) > 0.9 * changed.size


@pytest.mark.parametrize("config", [stage1b.config, stage2.config], ids=["1b", "2"])
def test_training_reads_them_and_validation_does_not(config):
    stage = stage_of(dataclasses.replace(config, unit_noise=0.5))
    batch = {"tokens": jnp.full((2, 8), FIRST)}
    read = []

    class Model:
        config = CONFIG

    def writing_loss(model, batch):
        read.append(batch["tokens"])
        return jnp.array(0.0), jnp.array(1.0)

    stage.writing_loss = writing_loss
    stage.loss(Model(), batch, jax.random.key(0))
    stage.measure(Model(), batch, jax.random.key(0))
    assert (read[0] != FIRST).any() and (read[1] == FIRST).all()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="expected at least 0 and less than 1"):
        dataclasses.replace(stage1b.config, unit_noise=share)

"""The vocoder protocol: a vocoder of a few lines, registered here, runs through the program."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic.dataclasses import dataclass

from omni2_jax.config import HiftConfig
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.models import vocoder
from omni2_jax.models.offline import synthesize
from tests.support.conversations import GREEDY, SHORT, Said, submit


@dataclass(frozen=True)
class EnergyConfig(HiftConfig):
    """It passes for a HiftConfig here; a real one is added to the union in config/model.py."""

    kind: Literal["energy"] = "energy"
    overlap: int = 0


class Energy(nnx.Module):
    """Samples that are the mean of their mel frame plus a little noise. It holds nothing back."""

    def __init__(self, config: EnergyConfig, rngs: nnx.Rngs):
        self.config = config
        self.gain = nnx.Param(jnp.ones(1), axes=(None,))

    def empty_state(self, batch: int) -> jax.Array:
        return jnp.zeros(batch, jnp.int32)  # frames so far

    def restart(self, state: jax.Array, slots: jax.Array) -> jax.Array:
        return jnp.where(slots, 0, state)

    def step(self, state, mel, frames, final, keys, seamless):
        rate = self.config.samples_per_frame
        noise = jax.vmap(lambda key: jax.random.normal(key, (mel.shape[1] * rate,)))(keys)
        samples = self.gain[...] * jnp.repeat(mel.mean(-1), rate, 1) + 1e-3 * noise
        inside = jnp.arange(samples.shape[1]) < rate * frames[:, None]
        return state + frames, jnp.where(inside, samples, 0), rate * frames


@pytest.fixture
def energy(model, monkeypatch) -> Omni2:
    """The tiny release with the other vocoder."""
    monkeypatch.setitem(vocoder.VOCODERS, "energy", Energy)
    config = model.config.replace(vocoder=EnergyConfig())
    network = nnx.merge(model.graph, model.params)
    network.config, network.vocoder = config, vocoder.build(config.vocoder, nnx.Rngs(0))
    graph, params = nnx.split(network)
    sharding = jax.tree.leaves(model.params)[0].sharding
    params = jax.device_put(nnx.to_pure_dict(params), sharding)
    return Omni2(model.directory, config, graph, params, model.tokenizer, model.defaults)


@pytest.mark.slow
def test_another_vocoder_speaks(energy):
    """Every unit gives 960 samples, in every slot, and a restarted slot gives the same ones."""
    engine = energy.engine(GREEDY, 1000, slots=2)
    streams = [submit(engine, energy, "E", **SHORT) for _ in range(3)]
    answers = [Said.by(stream) for stream in streams]
    units = [token for token in answers[0].speech if token > energy.config.tokens.sep]
    assert answers[0].samples.size == 960 * len(units) > 0 and np.ptp(answers[0].samples) > 0.1
    assert all(answer == answers[0] for answer in answers[1:])
    assert engine.state.vocoder.tolist()[0] == 2 * len(units)


def test_whole_answers(energy):
    """Units to samples in one pass: 960 samples a unit, fewer at a higher speed."""

    def run(speed: float) -> tuple[np.ndarray, np.ndarray]:
        network = nnx.merge(energy.graph, energy.params)
        units, lengths = jnp.arange(24).reshape(2, 12), jnp.array([12, 5])
        keys, voice = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 192))
        return synthesize(network, units, lengths, voice, keys, speed)

    samples, counts = jax.jit(run, static_argnums=0)(1.0)
    assert counts.tolist() == [12 * 960, 5 * 960] and samples.shape == (2, 12 * 960)
    assert np.ptp(samples[1, : 5 * 960]) > 0.1 and not np.any(samples[1, 5 * 960 :])
    _, counts = jax.eval_shape(lambda: run(1.3))
    assert counts.shape == (2,)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"vocoder\.kind is 'energy', expected one of hift"):
        vocoder.build(EnergyConfig(), nnx.Rngs(0))

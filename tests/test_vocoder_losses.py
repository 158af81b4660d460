"""The losses of the vocoder's training, by hand on signals and on tiny arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.train import discriminators as judges
from omni2_jax.train import spectral
from tests.support.networks import fresh_model

BOTH = jnp.array([True, True])


@pytest.fixture
def signal():
    return 0.1 * np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)


def test_magnitudes(signal):
    """Those of numpy's Fourier transform of each Hann window, without padding."""
    size, hop = 512, 128
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    starts = range(0, signal.shape[1] - size + 1, hop)
    expected = [np.abs(np.fft.rfft(window * signal[1, start : start + size])) for start in starts]
    found = jax.jit(spectral.magnitudes, static_argnums=1)(signal, size)
    np.testing.assert_allclose(found[1], expected, atol=1e-4)


def test_a_louder_signal(signal):
    """Twice the amplitude: log 2 nepers more; its magnitudes are off by as much as they should be.

    A row that does not count changes nothing.
    """
    louder = signal * np.array([[2], [1]], np.float32)
    first = jnp.array([True, False])
    mel_loss, stft_loss = jax.jit(spectral.mel_loss), jax.jit(spectral.stft_loss)
    assert mel_loss(louder, signal, first) == pytest.approx(math.log(2), rel=1e-3)
    assert stft_loss(louder, signal, first) == pytest.approx(1 + math.log(2), rel=1e-3)
    assert mel_loss(louder, signal, BOTH) == pytest.approx(math.log(2) / 2, rel=1e-3)
    assert mel_loss(signal, signal, BOTH) == 0


def test_block_convolution():
    """One that spans two strides and three steps beside equals XLA's, which is padded likewise."""
    conv = judges.BlockConv(nnx.Rngs(0), 3, 5, stride=4, spans=2, beside=3)
    x = np.random.default_rng(1).standard_normal((2, 6, 10, 3)).astype(np.float32)

    @jax.jit
    def run(x):
        kernel = conv.linear.kernel[...].reshape(3, 8, 3, 5)
        return conv(x), jax.lax.conv_general_dilated(
            x, kernel, (1, 4), ((1, 1), (0, 6)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found, expected = run(x)
    assert found.shape == (2, 6, 3, 5)
    np.testing.assert_allclose(found, expected[:, :, :3], atol=1e-5)


# Two rows, of two discriminators: one feature map and the scores of each.
REAL = [[jnp.array([[1.0], [5.0]]), jnp.array([[0.5, 1.0], [3.0, 3.0]])], [jnp.ones((2, 2))]]
FALSE = [[jnp.array([[4.0], [5.0]]), jnp.array([[0.0, 2.0], [9.0, 9.0]])], [jnp.zeros((2, 2))]]


def test_adversarial_losses_by_hand():
    first = jnp.array([True, False])
    # (1 - 0.5)^2 / 2 + (0^2 + 2^2) / 2 of one, (1 - 1)^2 + 0^2 of the other.
    assert jax.jit(judges.discriminator_loss)(REAL, FALSE, first) == pytest.approx(0.125 + 2)
    # ((1 - 0)^2 + (1 - 2)^2) / 2, and 1 - 0.
    assert jax.jit(judges.adversarial_loss)(FALSE, first) == pytest.approx(1 + 1)
    # 3 of the map; (0.5 + 1) / 2 of the scores; 1 of the other's scores.
    assert jax.jit(judges.feature_loss)(REAL, FALSE, first) == pytest.approx(3 + 0.75 + 1)


def test_relativistic_loss_by_hand():
    """Scores that exceed the others by the same everywhere cost nothing; others at most TAU."""
    loss = jax.jit(judges.relativistic_loss)
    assert loss(REAL[1:], FALSE[1:], BOTH) == 0
    scores, zeros = jnp.array([[0.0, 0.0, -0.1], [0.0, 0.3, 0.0]]), jnp.zeros((2, 3))
    assert loss([[scores]], [[zeros]], BOTH) == pytest.approx(0.01, rel=1e-5)
    assert loss([[9 * scores]], [[zeros]], BOTH) == pytest.approx(judges.TAU)


def test_every_part_of_the_discriminators_learns():
    graph, params = fresh_model(lambda rngs: judges.Discriminators(rngs, 4, (2, 3), (64,)))
    x = 0.1 * np.random.default_rng(2).standard_normal((2, 600)).astype(np.float32)

    @jax.jit
    def gradients(params):
        def loss(params):
            network = nnx.merge(graph, params)
            return judges.discriminator_loss(network(x), network(2 * x), BOTH)

        return jax.grad(loss)(params)

    maps = jax.eval_shape(nnx.merge(graph, params), x)
    assert [len(maps_of_one) for maps_of_one in maps] == [4, 4, 4]
    grads = jax.tree.leaves(gradients(params))
    assert all(np.isfinite(grad).all() and np.any(grad) for grad in grads)

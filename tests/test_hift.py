"""HiFT against the released generator; batches, padding and conversion change nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import HiftConfig
from omni2_jax.convert.formats import abstract, torch_file
from omni2_jax.convert.plan import plan, unplan
from omni2_jax.convert.tables.hift import plain_names, table
from omni2_jax.models.offline import change_speed
from omni2_jax.models.vocoder.hift import Hift, draw, stft
from tests.support.compare import assert_wav
from tests.support.networks import TINY_HIFT as TINY
from tests.support.networks import abstract_model, hift_params, stored_draws, tiny_hift
from tests.support.paths import DECODER, GOLDENS


@pytest.fixture(scope="module")
def params():
    return hift_params()


@pytest.fixture(scope="module")
def hift(params):
    return tiny_hift(params)


@pytest.fixture(scope="module")
def golden():
    return np.load(DECODER / "hift.npz")


@pytest.fixture(scope="module")
def draws():
    return stored_draws()


def test_f0(hift, golden):
    mel = jnp.asarray(golden["mel"].T)[None]
    f0 = jax.jit(hift.f0)(mel, jnp.array([mel.shape[1]]))
    np.testing.assert_allclose(f0[0], golden["f0"], rtol=0, atol=0.01)


def test_source(hift, golden, draws):
    phase, noise = draws
    source = jax.jit(hift.source)(
        jnp.asarray(golden["f0"])[None], phase, noise[:, : golden["source"].size]
    )
    np.testing.assert_allclose(source[0], golden["source"], rtol=0, atol=1e-3)


def test_spectrum(golden):
    part = golden["source"][:4800]
    spectra = np.asarray(stft(jnp.asarray(part)[None], jnp.array([4800]), TINY.n_fft, TINY.hop))[0]
    np.testing.assert_allclose(
        spectra, np.concatenate([golden["stft_real"], golden["stft_imag"]]).T, rtol=0, atol=1e-5
    )


def test_end_to_end(hift, golden, draws):
    phase, noise = draws
    mel = jnp.asarray(golden["mel"].T)[None]
    wav = jax.jit(hift)(mel, jnp.array([mel.shape[1]]), phase, noise[:, : golden["wav"].size])
    assert_wav(wav[0], golden["wav"], 2e-2, 1e-3)


def test_batch_of_different_lengths(hift, golden):
    """Three goldens in one batch, NaN after each row's end; a row without frames is silent."""
    rows = [
        (golden["mel"].T, golden["source"], golden["wav"]),
        (golden["mel_cached"].T, golden["source_cached"], golden["wav_cached"]),
        (golden["mel"].T[:20], np.zeros(9600, np.float32), golden["wav_zero_source"]),
        (golden["mel"].T[:0], np.zeros(0, np.float32), np.zeros(0, np.float32)),
    ]
    longest = len(rows[0][0])

    def pad(x: np.ndarray, size: int, junk: float) -> np.ndarray:
        return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), junk, np.float32)])

    mel = jnp.asarray(np.stack([pad(mel, longest, np.nan) for mel, _, _ in rows]))
    source = jnp.asarray(
        np.stack([pad(source, longest * TINY.samples_per_frame, 1e3) for _, source, _ in rows])
    )
    wavs = jax.jit(hift.decode)(mel, jnp.array([len(mel) for mel, _, _ in rows]), source)
    for wav, (_, _, expected) in zip(wavs, rows, strict=True):
        np.testing.assert_allclose(wav[: expected.size], expected, rtol=0, atol=1e-3)
        assert not np.any(wav[expected.size :])


def test_f0_ignores_padding(hift, golden):
    mel = jnp.asarray(golden["mel_cached"].T)[None]
    alone = jax.jit(hift.f0)(mel, jnp.array([36]))
    padded = jax.jit(hift.f0)(
        jnp.pad(mel, ((0, 0), (0, 58), (0, 0)), constant_values=jnp.nan), jnp.array([36])
    )
    np.testing.assert_allclose(padded[0, :36], alone[0], rtol=0, atol=1e-3)


def test_phase_holds_for_a_minute(hift):
    """Against a float64 sum over one minute, at a pitch of no whole number of cycles a frame."""
    frames, rate, tail = 3000, TINY.samples_per_frame, 4800
    f0 = np.linspace(180.3, 220.7, frames, dtype=np.float32)
    noise = jnp.zeros((1, frames * rate, TINY.harmonics + 1))
    source = jax.jit(hift.source)(jnp.asarray(f0)[None], jnp.zeros((1, TINY.harmonics + 1)), noise)
    cycles = np.cumsum(np.repeat(f0.astype(np.float64), rate))[-tail:, None] / TINY.sample_rate
    sines = TINY.sine_amplitude * np.sin(
        2 * np.pi * (cycles * np.arange(1, TINY.harmonics + 2) % 1)
    )
    mix = hift.harmonic_mix
    expected = np.tanh(sines @ np.asarray(mix.kernel[...], np.float64) + np.asarray(mix.bias[...]))[
        :, 0
    ]
    np.testing.assert_allclose(source[0, -tail:], expected, rtol=0, atol=1e-3)


def test_draws_belong_to_their_row():
    """A row's draws depend on its key alone, not on other rows or on the number of samples."""
    keys = jax.random.split(jax.random.key(0), 3)
    phase, noise = draw(TINY, keys, 960)
    alone_phase, alone_noise = draw(TINY, keys[1:2], 480)
    assert np.array_equal(phase[1], alone_phase[0]) and np.array_equal(
        noise[1, :480], alone_noise[0]
    )
    assert (
        not np.any(phase[:, 0])
        and np.abs(phase).max() <= np.pi
        and len(np.unique(phase[:, 1:])) == phase[:, 1:].size
    )
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    fixed_phase, same_noise = draw(dataclasses.replace(TINY, random_phases=False), keys, 960)
    assert not np.any(fixed_phase) and np.array_equal(noise, same_noise)


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.3])
def test_change_speed(golden, speed):
    torch = pytest.importorskip("torch")

    mel, counts = golden["mel"].T, (94, 26)
    stretched, frames = change_speed(jnp.asarray(np.stack([mel, mel])), jnp.array(counts), speed)
    for row, count, size in zip(stretched, counts, frames, strict=True):
        original = torch.tensor(mel[:count].T)[None]
        expected = torch.nn.functional.interpolate(
            original, size=int(count / speed), mode="linear"
        )[0].T.numpy()
        assert size == len(expected)
        np.testing.assert_allclose(row[:size], expected, rtol=0, atol=1e-5)


def test_compiles_once_for_all_lengths(hift, golden):
    traces = []

    @jax.jit
    def f0(mel, frames):
        traces.append(frames)
        return hift.f0(mel, frames)

    mel = jnp.asarray(golden["mel"].T)[None]
    for count in (94, 36, 0):
        f0(mel, jnp.array([count]))
    assert len(traces) == 1


def test_table_covers_the_released_model():
    manifest = json.loads((GOLDENS / "manifests" / "hift.json").read_text())["keys"]
    plan(
        table(HiftConfig()), abstract(manifest), abstract_model(Hift, HiftConfig())[1], "hift.json"
    )


def test_both_weight_norm_layouts(params):
    names = torch_file(DECODER / "hift.pt")
    newer = {
        "weight_g": "parametrizations.weight.original0",
        "weight_v": "parametrizations.weight.original1",
    }
    renamed = {
        ".".join(newer.get(part, part) for part in name.split(".")): value
        for name, value in names.items()
    }
    assert renamed.keys() != names.keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, hift_params(plain_names(renamed)), params))


def test_round_trip_is_bit_equal(params, tmp_path):
    torch = pytest.importorskip("torch")

    written = unplan(table(TINY), lambda path: np.asarray(flatten(params)[path]))
    torch.save({name: torch.tensor(tensor) for name, tensor in written}, tmp_path / "hift.pt")
    back = torch_file(tmp_path / "hift.pt")
    assert set(back) == set(plain_names(torch_file(DECODER / "hift.pt")))
    assert jax.tree.all(jax.tree.map(np.array_equal, hift_params(back), params))


def test_pitch_and_source_are_in_true_float32(hift):
    """Every product of the F0 predictor and of the source is one of highest precision."""
    mel = jnp.zeros((1, 6, TINY.mels))
    noise = jnp.zeros((1, 6 * TINY.samples_per_frame, TINY.harmonics + 1))

    def source(mel):
        f0 = hift.f0(mel, jnp.array([6]))
        return hift.source(f0, jnp.zeros((1, TINY.harmonics + 1)), noise)

    text = jax.jit(source).lower(mel).as_text()
    products = [
        line for line in text.splitlines() if "convolution(" in line or "dot_general" in line
    ]
    assert len(products) == hift.f0.layers + 1
    assert all("HIGHEST" in line for line in products)

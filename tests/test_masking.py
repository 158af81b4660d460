"""SpecAugment in stage 1a: `mel_masks`."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.configs import stage1a
from omni2_jax.train.masking import STRETCH, masked
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import speech_to_text, stage_of


def spectrograms() -> jax.Array:
    """[200, 100, 80], no number of which is the mean of a spectrogram."""
    return jnp.asarray(np.random.default_rng(0).uniform(0, 1, (200, 100, 80)) ** 2)


def test_bands_and_stretches_are_hidden():
    mel = spectrograms()
    hidden = np.asarray(masked(mel, 1, jax.random.key(0)) != mel)
    bands = hidden.all(axis=1).sum(axis=1)  # whole columns of a spectrogram
    stretches = hidden.all(axis=2).sum(axis=1)
    assert set(bands) == set(range(11)) and set(stretches) == set(range(STRETCH + 1))
    cross = hidden.all(axis=1)[:, None, :] | hidden.all(axis=2)[:, :, None]
    np.testing.assert_array_equal(hidden, cross)  # and nothing else
    for row in hidden:  # one band and one stretch, so each is in one piece
        for axis in (0, 1):
            places = np.flatnonzero(row.all(axis=axis))
            assert len(places) == 0 or np.ptp(places) == len(places) - 1
    everywhere = hidden.any(axis=0)
    assert everywhere.all()


def test_what_is_hidden_is_the_mean_of_its_spectrogram():
    mel = spectrograms()
    new = masked(mel, 3, jax.random.key(1))
    means = np.broadcast_to(mel.mean(axis=(1, 2), keepdims=True), mel.shape)
    np.testing.assert_allclose(new[new != mel], means[np.asarray(new != mel)], rtol=1e-5)


def test_training_hides_and_validation_does_not(monkeypatch):
    """Also, each step hides something else."""
    stage = stage_of(dataclasses.replace(stage1a.config, ctc=0.3, mel_masks=2))
    calls = []

    def hear(model, train, batch, key=None):
        calls.append(key)
        raise StopIteration

    monkeypatch.setattr(speech_to_text, "hear", hear)
    batch = {"question": np.zeros((1, 1, 5), np.int32)}
    for method in (stage.loss, stage.ctc_loss, stage.measure):
        with pytest.raises(StopIteration):
            method(None, batch, jax.random.key(3))
    assert calls[0] is not None and calls[1] is not None and calls[2] is None


@pytest.mark.parametrize("masks", [0, 2])
def test_the_encoder_reads_what_is_left(masks):
    """The mel that the encoder gets is the masked one, if there is a key and the setting is on."""
    train = TrainConfig(stage="1a", checkpoint="c", data="d", mel_masks=masks, dtype="float32")
    read = []

    def speech_encoder(mel):
        read.append(np.asarray(mel))
        return mel

    model = SimpleNamespace(
        config=SimpleNamespace(speech_encoder=SimpleNamespace(mels=80)),
        speech_encoder=speech_encoder,
    )
    audio = np.random.default_rng(0).integers(-9999, 9999, (1, 2, 16000), np.int16)
    for key in (None, jax.random.key(0), jax.random.key(1)):
        speech_to_text.encode_questions(model, train, {"audio": jnp.asarray(audio)}, key)
    assert (read[0] != read[1]).any() == (read[1] != read[2]).any() == (masks > 0)


def test_bad_settings():
    with pytest.raises(ValueError, match="mel_masks is -1, expected at least 0"):
        dataclasses.replace(stage1a.config, mel_masks=-1)
    with pytest.raises(ValueError, match="frames is left out"):
        dataclasses.replace(stage1a.config, mel_masks=1, frames="frames")

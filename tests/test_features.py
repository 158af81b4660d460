"""The spectra against the numbers of Whisper's, Kaldi's and CosyVoice's own code."""

import numpy as np
import pytest

from omni2_jax.audio import features, recordings
from tests.support.compare import close
from tests.support.paths import AUDIO

CLIPS = ("short_d", "speech_a")


@pytest.fixture(scope="module")
def golden():
    return {clip: np.load(AUDIO / f"{clip}.npz") for clip in CLIPS}


@pytest.fixture(scope="module")
def clips():
    return [recordings.load(AUDIO / f"{clip}.wav") for clip in CLIPS]


def close_fbank(actual, expected, raw):
    """1e-3, and 5e-3 where the energy is near float32's epsilon."""
    error = np.abs(np.asarray(actual) - expected)
    assert error.shape == expected.shape and error.max() < 5e-3 and error[raw > -14].max() < 1e-3


def test_log_mel_of_a_padded_turn(golden, clips):
    mels = features.log_mel(recordings.pad(clips, 480000)[0])
    assert mels.shape == (len(CLIPS), 3000, 128)
    for row, clip in zip(mels, CLIPS, strict=True):
        close(row.T, golden[clip]["logmel_pad30"], 1e-4)


@pytest.mark.parametrize("i", range(len(CLIPS)))
def test_features_of_one_clip(golden, clips, i):
    expected, x = golden[CLIPS[i]], clips[i][None]
    close(features.log_mel(x)[0].T, expected["logmel_unpadded"], 1e-4)
    close(features.mel24k(expected["wav24k"][None])[0].T, expected["mel24k"], 1e-3)
    close_fbank(
        features.fbank(x, subtract_mean=False)[0], expected["fbank_raw"], expected["fbank_raw"]
    )
    close_fbank(features.fbank(x)[0], expected["fbank_cmn"], expected["fbank_raw"])


def test_a_batch_is_its_clips_one_by_one(golden, clips):
    """Each row has its own reflection, maximum and mean, whatever noise pads it; zeros behind."""
    noise = np.random.default_rng(0).normal(size=(len(CLIPS), 70000)).astype(np.float32)

    def batch(rows):
        x, lengths = recordings.pad(rows, 70000)
        return np.where(np.arange(70000) < lengths[:, None], x, noise), lengths

    log_mel, fbank = features.log_mel(*batch(clips)), features.fbank(*batch(clips))
    mel24k = features.mel24k(*batch([golden[clip]["wav24k"] for clip in CLIPS]))
    for i, clip in enumerate(CLIPS):
        expected = golden[clip]
        for actual, name in ((log_mel[i], "logmel_unpadded"), (mel24k[i], "mel24k")):
            frames = expected[name].shape[1]
            close(actual[:frames].T, expected[name], 1e-4 if actual is log_mel[i] else 1e-3)
            assert not np.any(actual[frames:])
        frames = len(expected["fbank_cmn"])
        assert features.fbank_frames(len(clips[i])) == frames and not np.any(fbank[i, frames:])
        close_fbank(fbank[i, :frames], expected["fbank_cmn"], expected["fbank_raw"])


def test_silence_is_the_floor():
    x = np.zeros((1, 16000), np.float32)
    close(features.log_mel(x)[0], np.full((100, 128), -1.5, np.float32), 1e-6)
    close(
        features.fbank(x, subtract_mean=False)[0],
        np.full((98, 80), np.log(2.0**-23), np.float32),
        1e-5,
    )


def test_resampling_agrees_with_torchaudio(golden, clips):
    """To 36-48 dB: torchaudio's short filter is that far from an ideal band limit.

    soxr is 56-70 dB from it on these recordings.
    """
    for clip, x in zip(CLIPS, clips, strict=True):
        expected, actual = golden[clip]["wav24k"], recordings.resample(x, 16000, 24000)
        assert actual.shape == expected.shape
        assert 10 * np.log10(np.square(expected).sum() / np.square(actual - expected).sum()) > 35

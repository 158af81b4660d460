"""Features against Whisper's, Kaldi's and CosyVoice's own numbers; files of every kind in; nothing half-written out."""

import json

import numpy as np
import pytest
import soundfile

from omni2_jax.audio import features, recordings
from tests.support.compare import close
from tests.support.paths import AUDIO, EXAMPLES

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


# ---- features ----


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
    """Whatever lies behind the end of a row: each has its own reflection, maximum and mean, and zeros behind."""
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


# ---- files ----


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [("wav", 16000, 1), ("wav", 44100, 2), ("flac", 48000, 3), ("ogg", 22050, 2), ("wav", 8000, 1)],
)
def test_load_any_kind(tmp_path, suffix, rate, channels):
    """Channels of 0.5, 1 and 1.5 times the tone average to it; the ends are left out, a resampler rings there."""
    path = tmp_path / f"tone.{suffix}"
    gains = {1: [1.0], 2: [0.5, 1.5], 3: [0.5, 1.0, 1.5]}[channels]
    soundfile.write(path, tone(rate)[:, None] * gains, rate)
    x = recordings.load(path)
    assert x.dtype == np.float32 and x.shape == (8000,)
    assert np.abs(x - tone(16000))[800:-800].max() < (0.05 if suffix == "ogg" else 1e-3)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing.wav", "No such file"),
        ("", "Is a directory"),
        ("text.wav", "not audio"),
        ("noise.raw", "not audio"),
        ("empty.wav", "no samples"),
        ("nan.wav", "1 NaN or infinite"),
        ("infinite.wav", "1 NaN or infinite"),
        ("cut.flac", "not audio"),
        ("cut.wav", "cut short"),
    ],
)
def test_load_refuses_in_one_line(tmp_path, name, complaint):
    (tmp_path / "text.wav").write_text("this is not audio\n" * 9)
    (tmp_path / "noise.raw").write_bytes(bytes(range(256)))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    for bad, value in (("nan", np.nan), ("infinite", np.inf)):
        soundfile.write(tmp_path / f"{bad}.wav", np.array([0, value, 0]), 16000, subtype="FLOAT")
    for kind in ("flac", "wav"):
        soundfile.write(
            tmp_path / f"whole.{kind}", np.random.default_rng(0).normal(size=9000) / 9, 16000
        )
        (tmp_path / f"cut.{kind}").write_bytes((tmp_path / f"whole.{kind}").read_bytes()[:5000])
    with pytest.raises(ValueError, match=complaint) as error:
        recordings.load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_resampling_agrees_with_torchaudio(golden, clips):
    """To 36-48 dB, no better: torchaudio's short filter is that far from an ideal band limit, soxr 56-70 dB on the speech clips."""
    for clip, x in zip(CLIPS, clips, strict=True):
        expected, actual = golden[clip]["wav24k"], recordings.resample(x, 16000, 24000)
        assert actual.shape == expected.shape
        assert 10 * np.log10(np.square(expected).sum() / np.square(actual - expected).sum()) > 35


def test_save_and_load_again(tmp_path):
    recordings.save(tmp_path / "tone.wav", np.append(tone(24000), [2.0, -2.0]))
    info, x = (
        soundfile.info(tmp_path / "tone.wav"),
        recordings.load(tmp_path / "tone.wav", rate=24000),
    )
    assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
    close(x, np.append(tone(24000), [1, -1]).astype(np.float32), 1e-4)


def test_a_failed_save_leaves_nothing(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for path, samples in (
        ("folder.wav", [0.0]),
        ("absent/x.wav", [0.0]),
        ("nan.wav", [np.nan]),
        ("empty.wav", []),
    ):
        with pytest.raises(ValueError, match=path) as error:
            recordings.save(tmp_path / path, np.array(samples))
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


# ---- turns ----


def test_fit():
    x = np.arange(250, dtype=np.float32)
    assert [len(c) for c in recordings.fit(x[:100], window=100)] == [100]
    assert [len(c) for c in recordings.fit(x, "truncate", 100)] == [100]
    pieces = recordings.fit(x, "split", 100)
    assert [len(c) for c in pieces] == [100, 100, 50] and np.array_equal(np.concatenate(pieces), x)
    x = np.zeros(400_000, np.float32)
    with pytest.raises(ValueError, match=r"long\.wav is 25\.00 s long; at most 10 s"):
        recordings.fit(x, window=160_000, name="long.wav")
    with pytest.raises(ValueError, match="'cut'"):
        recordings.fit(x, "cut")


def test_examples_are_there_and_small():
    items = json.loads((EXAMPLES / "questions.json").read_text())
    assert [[turn["from"] for turn in item["conversation"]] for item in items] == [
        ["human"],
        ["human", "gpt", "human"],
    ]
    names = [
        turn["speech"] for item in items for turn in item["conversation"] if turn["from"] == "human"
    ]
    for name in [*names, "voice.wav"]:
        info = soundfile.info(EXAMPLES / name)
        assert (info.samplerate, info.channels, info.subtype) == (
            16000,
            1,
            "PCM_16",
        ) and 2 < info.duration < 6
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 600_000

"""Sound files: every kind in, bad ones refused in one line and in bounds, nothing half-written."""

import io
import json
import os
import struct
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr

from omni2_jax.audio import recordings
from omni2_jax.generate.prompts import load_segments
from tests.support.compare import close
from tests.support.paths import EXAMPLES

RANDOM = np.random.default_rng(0)


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    """440 Hz at half of full scale."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, format: str, subtype: str) -> bytes:
    """A sound file's content."""
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=format, subtype=subtype)
    return content.getvalue()


# ---- reading ----


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [("wav", 16000, 1), ("wav", 44100, 2), ("flac", 48000, 3), ("ogg", 22050, 2), ("wav", 8000, 1)],
)
def test_load_any_kind(tmp_path, suffix, rate, channels):
    """Channels of 0.5, 1 and 1.5 times the tone average to it. A resampler rings at the ends."""
    path = tmp_path / f"tone.{suffix}"
    gains = {1: [1.0], 2: [0.5, 1.5], 3: [0.5, 1.0, 1.5]}[channels]
    soundfile.write(path, tone(rate)[:, None] * gains, rate)
    x = recordings.load(path)
    assert x.dtype == np.float32 and x.shape == (8000,)
    assert np.abs(x - tone(16000))[800:-800].max() < (0.05 if suffix == "ogg" else 1e-3)


@pytest.mark.parametrize("rate, channels", [(16000, 1), (44100, 2), (8000, 3), (48000, 5)])
def test_blocks_give_what_one_pass_gives(tmp_path, monkeypatch, rate, channels):
    """Bit for bit; and so does a cut, which decodes a second more than it keeps."""
    samples = RANDOM.normal(size=(rate * 3 + 17, channels)) / 10
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype="FLOAT")
    expected = soundfile.read(tmp_path / "x.wav", dtype="float32", always_2d=True)[0].mean(axis=1)
    if rate != 16000:
        expected = soxr.resample(expected, rate, 16000, quality="HQ")
    for block in (1000, 2**20):
        monkeypatch.setattr(recordings, "BLOCK", block)
        np.testing.assert_array_equal(recordings.load(tmp_path / "x.wav"), expected)
        cut = recordings.load(tmp_path / "x.wav", seconds=1, over="truncate")
        np.testing.assert_array_equal(cut, expected[:16000])


NO_PATH = {  # what is no regular file
    "missing.wav": "No such file",
    "": "Is a directory",
    "pipe.wav": "is not a regular file",
    "zero.wav": "is not a regular file",
    "null.wav": "is not a regular file",
    "loop.wav": "symbolic links",
    "a\0b.wav": "cannot be a file's name",
    "\ud800.wav": "cannot be a file's name",
    "x" * 300: "File name too long",
}


@pytest.mark.parametrize("name", NO_PATH)
def test_only_regular_files(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.wav")
    for link, target in (("zero", "/dev/zero"), ("null", "/dev/null"), ("loop", "loop.wav")):
        (tmp_path / f"{link}.wav").symlink_to(target)
    with pytest.raises(ValueError, match=NO_PATH[name]) as error:
        recordings.load(tmp_path / name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


WAVE = encoded(RANDOM.normal(size=9000) / 9, 16000, "WAV", "PCM_16")
FLAC = encoded(RANDOM.normal(size=9000) / 9, 16000, "FLAC", "PCM_16")
VORBIS = encoded(RANDOM.normal(size=30000) / 9, 16000, "OGG", "VORBIS")
OPUS = encoded(RANDOM.normal(size=30000) / 9, 16000, "OGG", "OPUS")


def flac_claiming(samples: int) -> bytes:
    """A FLAC whose header states another number of samples (36 bits of its STREAMINFO)."""
    stated = int.from_bytes(FLAC[18:26], "big") >> 36 << 36 | samples
    return FLAC[:18] + stated.to_bytes(8, "big") + FLAC[26:]


def big_endian() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, tone(16000), 16000, "PCM_16", "BIG", "WAV")
    return content.getvalue()


def floats(*samples: float) -> bytes:
    return encoded(np.array(samples), 16000, "WAV", "FLOAT")


def wave_of_rate(rate: int) -> bytes:
    return WAVE[:24] + struct.pack("<I", rate) + WAVE[28:]


BAD = {
    "text": (b"this is not audio\n" * 9, "not audio"),
    "no bytes": (b"", "not audio"),
    "noise": (bytes(range(256)), "not audio"),
    "no samples": (floats(), "no samples"),
    "NaN": (floats(0, np.nan, 0), "1 NaN or infinite samples of 3"),
    "infinite": (floats(0, np.inf, 0), "1 NaN or infinite"),
    "large": (floats(0, -1e38, 0), r"samples of up to 1\.0e\+38; expected -1 to 1"),
    "cut FLAC": (FLAC[:5000], "not audio"),
    "cut wav": (WAVE[:5000], "cut short: its header claims 18044 bytes, it has 5000"),
    "cut big-endian wav": (big_endian()[:5000], "cut short: its header claims 16044 bytes"),
    "cut ogg": (VORBIS[: VORBIS.rfind(b"OggS")], "cut short: its last page does not end"),
    "cut page": (OPUS[:-1], "cut short: its last page does not end.*write it anew.*ffmpeg"),
    "cut header of a page": (OPUS[: OPUS.rfind(b"OggS") + 9], "cut short: its last page"),
    "AIFF": (encoded(tone(16000), 16000, "AIFF", "PCM_16"), r"\(wav, flac or ogg\): .* is AIFF"),
    "two samples a second": (wave_of_rate(2), "2 samples a second; expected 2000 to 192000"),
    "a MHz": (wave_of_rate(10**6), "1000000 samples a second"),
    "hours": (flac_claiming(16000 * 7200), r"7200\.00 s long; at most 3600 s"),
    "unknown length": (flac_claiming(0), "does not state how long it is"),
    "MP3": (b"\xff\xfb\x90\x64" + bytes(999), "is an MP3"),
    "tagged MP3": (b"ID3\3\0\0\0\0\0\x02ab\xff\xfb\x90\x64" + bytes(999), "is an MP3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content(tmp_path, name):
    content, complaint = BAD[name]
    path = tmp_path / "x.raw"  # the suffix has no meaning
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as error:
        recordings.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_mp3_where_one_is_wanted(tmp_path):
    """It has the samples of the wav, nearly; one that cannot be read gets one line."""
    path, random = tmp_path / "x", np.random.default_rng(2)
    wave = np.cumsum(random.normal(size=16000)) / 300
    path.write_bytes(encoded(wave, 16000, "MP3", "MPEG_LAYER_III"))
    samples = recordings.load(path, seconds=1.5, mp3=True)
    assert len(samples) == 16000 and np.corrcoef(samples, wave)[0, 1] > 0.99
    with pytest.raises(ValueError, match=r"x is 1\.00 s long; at most 0\.5 s fit"):
        recordings.load(path, seconds=0.5, mp3=True)
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"not audio that can be read \(wav, flac, ogg or mp3\)"):
        recordings.load(path, mp3=True)


def test_a_long_file_is_not_decoded(tmp_path):
    """An hour of silence: refused from its header, or cut after 30 s, in little memory."""
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, subtype="PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 8000, np.int16))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"hour\.flac is 3600\.00 s long; at most 30 s fit"):
        recordings.load_turn(path)
    (turn,) = recordings.load_turn(path, "truncate")
    assert len(turn) == recordings.TURN_SAMPLES
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


FORMATS = (
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("WAV", "MS_ADPCM")),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16")),
)


def test_changed_headers(tmp_path):
    """Random bytes, large numbers and cuts in 160 headers: read, or one line, in little memory."""
    random = np.random.default_rng(1)
    numbers = (0, 1, 2, 65535, 400_000, 2**31 - 1, 2**31, 2**32 - 1)
    path = tmp_path / "x.wav"
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for format, subtype in FORMATS:
        whole = encoded(random.normal(size=(2000, 2)) / 10, 16000, format, subtype)
        for trial in range(20):
            content = bytearray(whole)
            place = int(random.integers(0, 120))
            if trial % 4 == 0:
                content[place : place + 4] = struct.pack("<I", random.choice(numbers))
            elif trial % 4 == 1:
                content[place : place + 4] = struct.pack(">I", random.choice(numbers))
            elif trial % 4 == 2:
                content[place] = random.integers(0, 256)
            else:
                del content[random.integers(0, len(content)) :]
            path.write_bytes(content)
            try:
                recordings.load_turn(path, ("refuse", "truncate", "split")[trial % 3])
                outcomes["read"] += 1
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                outcomes["refused"] += 1
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert min(outcomes.values()) > 20


def test_check():
    assert recordings.check(np.ones(3), "x").tolist() == [1, 1, 1]
    for samples, complaint in (
        (np.ones((2, 2)), r"^x: shape \[2, 2\], expected one dimension"),
        (np.ones(0), "^x is empty"),
        (np.array([1e11]), "^x holds samples of up to 1.0e"),
    ):
        with pytest.raises(ValueError, match=complaint):
            recordings.check(samples, "x")


# ---- 16-bit samples ----


def test_int16():
    values = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(recordings.to_int16(recordings.from_int16(values)), values)
    samples = np.array([-2, -1, 0, 0.5, 1, 2])
    assert recordings.to_int16(samples).tolist() == [-32768, -32768, 0, 16384, 32767, 32767]
    assert recordings.to_int16(samples, 32767).tolist() == [-32767, -32767, 0, 16384, 32767, 32767]


def test_samples_given():
    """Int16 is heard as the file that it was read from; other integers have no known scale."""
    values = recordings.to_int16(tone(16000))
    for samples, expected in (
        (values, recordings.from_int16(values)),
        (tone(16000).astype(np.float64), tone(16000)),
        (jnp.ones(3, jnp.bfloat16), np.ones(3, np.float32)),
    ):
        (segment,) = load_segments(samples, "refuse", 16000)
        assert segment.dtype == np.float32 and np.array_equal(segment, expected)
    for kind in (np.int32, np.uint8, bool, complex, object):
        with pytest.raises(ValueError, match=r"^the samples given are of type .*expected int16"):
            load_segments(values.astype(kind), "refuse", 16000)
    with pytest.raises(ValueError, match=r"^the samples given: shape \[8000, 1\], expected one"):
        load_segments(values[:, None], "refuse", 16000)


# ---- writing ----


def test_save_and_load_again(tmp_path):
    path = tmp_path / "tone.wav"
    recordings.save(path, np.append(tone(24000), [2.0, -2.0]))
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
    expected = np.append(tone(24000), [1, -1]).astype(np.float32)
    close(recordings.load(path, rate=24000), expected, 1e-4)
    assert path.read_bytes() == encoded(
        recordings.to_int16(expected, 32767), 24000, "WAV", "PCM_16"
    )


def test_a_failed_save_leaves_nothing(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for path, samples in (
        ("folder.wav", [0.0]),
        ("absent/x.wav", [0.0]),
        ("nan.wav", [np.nan]),
        ("empty.wav", []),
        ("x" * 300, [0.0]),
    ):
        with pytest.raises(ValueError, match=path) as error:
            recordings.save(tmp_path / path, np.array(samples))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^cannot write /proc/x\.wav"):
        recordings.check_writable("/proc/x.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    path = tmp_path / "x.wav"
    with pytest.raises(KeyboardInterrupt), recordings.WavWriter(path) as writer:
        writer.write(tone(24000))
        assert not path.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_writer_appends(tmp_path, capfdbinary):
    with recordings.WavWriter(tmp_path / "x.wav") as writer, recordings.WavWriter("-") as pipe:
        for part in np.split(tone(24000), 3):
            writer.write(part)
            pipe.write(part)
    pcm = recordings.to_int16(tone(24000), 32767)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "x.wav", dtype="int16")[0], pcm)
    assert capfdbinary.readouterr().out == pcm.astype("<i2").tobytes()
    with recordings.WavWriter(None) as nowhere:
        nowhere.write(tone(24000))


# ---- turns ----


def test_fit():
    x = np.arange(250, dtype=np.float32)
    assert [len(segment) for segment in recordings.fit(x[:100], window=100)] == [100]
    assert [len(segment) for segment in recordings.fit(x, "truncate", 100)] == [100]
    segments = recordings.fit(x, "split", 100)
    assert [len(segment) for segment in segments] == [100, 100, 50]
    assert np.array_equal(np.concatenate(segments), x)
    with pytest.raises(ValueError, match=r"long\.wav is 25\.00 s long; at most 10 s"):
        recordings.fit(np.zeros(400_000, np.float32), window=160_000, name="long.wav")
    with pytest.raises(ValueError, match="'cut'"):
        recordings.fit(x, "cut")


def test_load_turn_is_load_and_fit(tmp_path):
    path: Path = tmp_path / "x.wav"
    recordings.save(path, tone(16000, 2.5), 16000)
    whole = recordings.load(path)
    for over in ("truncate", "split"):
        segments = recordings.load_turn(path, over, window=16000)
        for actual, expected in zip(segments, recordings.fit(whole, over, 16000), strict=True):
            np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ValueError, match=r"x\.wav is 2\.50 s long; at most 1 s fit"):
        recordings.load_turn(path, window=16000)


def test_examples_are_there_and_small():
    items = json.loads((EXAMPLES / "questions.json").read_text())
    speakers = [[turn["from"] for turn in item["conversation"]] for item in items]
    assert speakers == [["human"], ["human", "gpt", "human"]]
    names = [
        turn["speech"] for item in items for turn in item["conversation"] if turn["from"] == "human"
    ]
    for name in [*names, "voice.wav"]:
        info = soundfile.info(EXAMPLES / name)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 2 < info.duration < 6
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 600_000

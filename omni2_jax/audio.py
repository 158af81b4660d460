"""Sound files in and out, and the three spectra the model listens to, time-major. B batch, N samples, T frames, M mel bins, F bins.

A feature takes clips [B, N] in [-1, 1] and, where clips are padded to a common N, their `lengths` [B] in samples: every
row then gives the numbers it gives alone, and zeros behind its last frame.
"""

import functools
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import soxr

Array = jax.Array

RATE = 16000  # what the speech encoder, the speech tokenizer and the speaker encoder hear
SPEECH_RATE = 24000  # what the vocoder speaks
TURN_SECONDS = 30  # Whisper's window
ENDLESS = 0x7FFF0000  # a wav that was written to a pipe claims this many bytes or more

WHISPER_FFT, WHISPER_HOP = 400, 160
SPEECH_FFT, SPEECH_HOP = 1920, 480
KALDI_FRAME, KALDI_HOP, KALDI_FFT = 400, 160, 512


# ---- files ----


def load(path: str | Path, rate: int = RATE) -> np.ndarray:
    """Read a wav, flac or ogg file of any rate and channel count -> float32 [N], mono (channels averaged), at `rate` Hz.

    Raises ValueError, one line naming the file: missing, a directory, unreadable, not audio, cut short, empty, NaN or infinite.
    """
    try:
        content = Path(path).read_bytes()
        samples, source_rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path} is not audio that can be read (wav, flac or ogg): {getattr(error, 'error_string', error)}") from None
    claimed = 8 + int.from_bytes(content[4:8], "little")
    if content.startswith(b"RIFF") and len(content) < claimed < ENDLESS:
        raise ValueError(f"{path} is cut short: its header claims {claimed} bytes, it has {len(content)}")
    return check(resample(check(samples, path).mean(axis=1), source_rate, rate), path)


def check(samples: np.ndarray, name: str | Path) -> np.ndarray:
    """The samples, if there are any and all are finite; otherwise ValueError."""
    if not len(samples):
        raise ValueError(f"{name} is empty: it holds no samples")
    bad = np.count_nonzero(~np.isfinite(samples))
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite samples of {samples.size}")
    return samples


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Samples [N] at `source` Hz -> [N * target / source] at `target` Hz (soxr, high quality)."""
    return samples if source == target else soxr.resample(samples, source, target, quality="HQ")


def save(path: str | Path, samples: np.ndarray, rate: int = SPEECH_RATE) -> None:
    """Write samples [N] in [-1, 1] (clipped to it) as a 16-bit mono wav; the file appears whole or not at all.

    Raises ValueError, one line naming the file: not writable, empty, NaN or infinite.
    """
    path = Path(path)
    samples = to_pcm(check(np.asarray(samples, np.float32), path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
        os.replace(aside, path)
    except (OSError, soundfile.SoundFileError) as error:
        aside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] (clipped to it) as 16-bit integers."""
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def writable(path: str | Path) -> None:
    """Raise ValueError unless a file can be written at `path`: told before minutes are spent on what goes into it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {path.parent} is not a directory that can be written to")


class Writer:
    """Samples to a 16-bit wav as they come, or as raw little-endian PCM to stdout for "-"; nowhere for None.

    A context manager. The wav appears under its name when the block ends well, and not at all otherwise.
    """

    def __init__(self, path: str | Path | None, rate: int = SPEECH_RATE):
        self.path, self.rate = path and Path(path), rate
        self.aside = self.path and self.path.with_name(self.path.name + ".partial")

    def __enter__(self) -> "Writer":
        self.file = None
        if self.path and str(self.path) != "-":
            writable(self.path)
            self.file = soundfile.SoundFile(self.aside, "w", self.rate, 1, "PCM_16", format="WAV")
        return self

    def write(self, samples: np.ndarray) -> None:
        if self.file:
            self.file.write(to_pcm(samples))
        elif self.path:
            sys.stdout.buffer.write(to_pcm(samples).astype("<i2").tobytes())
            sys.stdout.buffer.flush()

    def __exit__(self, kind, *_) -> None:
        if self.file:
            self.file.close()
            if kind is None:
                self.aside.replace(self.path)
            else:
                self.aside.unlink()


# ---- turns ----


def fit(
    samples: np.ndarray,
    seconds: float = TURN_SECONDS,
    over: Literal["refuse", "truncate", "split"] = "refuse",
    rate: int = RATE,
    name: str | Path = "the turn",
) -> list[np.ndarray]:
    """A clip [N] as clips of at most `seconds`: itself if it is short enough; else ValueError, its start, or consecutive pieces."""
    limit = round(seconds * rate)
    if over not in ("refuse", "truncate", "split"):
        raise ValueError(f"over is {over!r}; expected 'refuse', 'truncate' or 'split'")
    if len(samples) <= limit or over == "truncate":
        return [samples[:limit]]
    if over == "refuse":
        raise ValueError(f"{name} is {len(samples) / rate:.2f} s long; at most {seconds:g} s fit: truncate it, or split it")
    return [samples[start : start + limit] for start in range(0, len(samples), limit)]


def pad(clips: Sequence[np.ndarray], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Clips of different lengths -> [B, size] with zeros behind them (default: the longest clip), and their lengths [B]."""
    lengths = np.array([len(clip) for clip in clips], np.int32)
    size = int(lengths.max()) if size is None else size
    return np.stack([np.pad(clip, (0, size - len(clip))) for clip in clips]).astype(np.float32), lengths


# ---- features ----


@functools.partial(jax.jit, static_argnames="mels")
def log_mel(x: Array, lengths: Array | None = None, mels: int = 128) -> Array:
    """Whisper's log-mel at 16 kHz, [B, N] -> [B, N // 160, M] (whisper.audio.log_mel_spectrogram).

    The speech encoder's input is a clip padded to 480000 samples, without `lengths`: the silence belongs to the clip.
    """
    frames = x.shape[1] // WHISPER_HOP
    spectrum = power(cut(mirror(x, lengths, WHISPER_FFT // 2), WHISPER_FFT, WHISPER_HOP, frames), hann(WHISPER_FFT))
    y = jnp.log10(jnp.maximum(project(spectrum, slaney_bank(RATE, WHISPER_FFT, mels)), 1e-10))
    valid = None if lengths is None else within(lengths // WHISPER_HOP, frames)
    loudest = jnp.max(y, axis=(1, 2), keepdims=True, where=valid, initial=-10.0)
    return masked((jnp.maximum(y, loudest - 8) + 4) / 4, valid)


@functools.partial(jax.jit, static_argnames="mels")
def mel24k(x: Array, lengths: Array | None = None, mels: int = 80) -> Array:
    """The vocoder's log-mel at 24 kHz, [B, N] -> [B, N // 480, M] (matcha.utils.audio.mel_spectrogram, 0 to 8 kHz)."""
    frames = x.shape[1] // SPEECH_HOP
    margin = (SPEECH_FFT - SPEECH_HOP) // 2
    spectrum = power(cut(mirror(x, lengths, margin), SPEECH_FFT, SPEECH_HOP, frames), hann(SPEECH_FFT))
    y = jnp.log(jnp.maximum(project(jnp.sqrt(spectrum + 1e-9), slaney_bank(SPEECH_RATE, SPEECH_FFT, mels)), 1e-5))
    return masked(y, None if lengths is None else within(lengths // SPEECH_HOP, frames))


@functools.partial(jax.jit, static_argnames=("mels", "subtract_mean"))
def fbank(x: Array, lengths: Array | None = None, mels: int = 80, subtract_mean: bool = True) -> Array:
    """Kaldi's log filter bank at 16 kHz, [B, N] -> [B, fbank_frames(N), M], minus its mean over time unless told otherwise.

    No dither; the samples stay in [-1, 1], as CosyVoice feeds its speaker encoder (torchaudio.compliance.kaldi.fbank).
    """
    frames = fbank_frames(x.shape[1])
    y = cut(x.astype(jnp.float32), KALDI_FRAME, KALDI_HOP, frames)
    y = y - y.mean(-1, keepdims=True)
    y = y - 0.97 * jnp.concatenate([y[..., :1], y[..., :-1]], -1)  # pre-emphasis; the first sample is its own past
    y = jnp.log(jnp.maximum(project(power(y, povey(KALDI_FRAME), KALDI_FFT), kaldi_bank(mels)), np.finfo(np.float32).eps))
    valid = None if lengths is None else within(fbank_frames(lengths), frames)
    return masked(y - y.mean(1, keepdims=True, where=valid) if subtract_mean else y, valid)


def fbank_frames(samples):
    """Whole 25 ms frames, 10 ms apart, in so many samples (a number or an array; 0 for less than a frame)."""
    return (samples >= KALDI_FRAME) * (1 + (samples - KALDI_FRAME) // KALDI_HOP)


def within(lengths: Array, size: int) -> Array:
    """Which of `size` positions are inside each row: [B] -> bool [B, size, 1]."""
    return (jnp.arange(size)[None] < lengths[:, None])[..., None]


def masked(y: Array, valid: Array | None) -> Array:
    return y if valid is None else jnp.where(valid, y, 0.0)


def mirror(x: Array, lengths: Array | None, margin: int) -> Array:
    """[B, N] -> [B, N + 2 * margin]: each row reflected about its first and its last sample."""
    last = jnp.full(x.shape[:1], x.shape[1] - 1) if lengths is None else lengths - 1
    index = jnp.abs(jnp.arange(-margin, x.shape[1] + margin))[None]
    index = jnp.where(index > last[:, None], 2 * last[:, None] - index, index)
    return jnp.take_along_axis(x.astype(jnp.float32), index, axis=1, mode="clip")


def cut(x: Array, size: int, hop: int, frames: int) -> Array:
    """[B, N] -> overlapping frames [B, T, size], the first at sample 0."""
    return x[:, np.arange(frames)[:, None] * hop + np.arange(size)[None]]


def power(frames: Array, window: np.ndarray, n_fft: int | None = None) -> Array:
    """Frames [B, T, size] -> power spectrum [B, T, F]."""
    spectrum = jnp.fft.rfft(frames * window, n_fft)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def project(spectrum: Array, bank: np.ndarray) -> Array:
    """Spectrum [B, T, F] through a filter bank [F, M], in full float32: the logarithm shows every rounding of quiet bins."""
    return jnp.einsum("btf,fm->btm", spectrum, bank, precision="highest")


# ---- windows and filter banks ----


@functools.cache
def hann(size: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@functools.cache
def povey(size: int) -> np.ndarray:
    """Kaldi's default window: a symmetric Hann to the power 0.85."""
    return ((0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85).astype(np.float32)


def triangles(position: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Triangular filters [F, M] over bins at `position` [F]; filter m rises from corner m to m + 1 and falls to m + 2."""
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    rise, fall = (position[:, None] - low) / (peak - low), (high - position[:, None]) / (high - peak)
    return np.maximum(0, np.minimum(rise, fall))


@functools.cache
def slaney_bank(rate: int, n_fft: int, mels: int, top: float = 8000.0) -> np.ndarray:
    """Slaney's filter bank [F, M] from 0 to `top` Hz, each filter of unit area: linear below 1 kHz, logarithmic above."""
    knee, step = 1000 * 3 / 200, np.log(6.4) / 27
    mel = np.linspace(0, knee + np.log(top / 1000) / step, mels + 2)
    corners = np.where(mel < knee, mel * 200 / 3, 1000 * np.exp((mel - knee) * step))
    bank = triangles(np.fft.rfftfreq(n_fft, 1 / rate), corners) * 2 / (corners[2:] - corners[:-2])
    return bank.astype(np.float32)


@functools.cache
def kaldi_bank(mels: int, low: float = 20.0) -> np.ndarray:
    """Kaldi's filter bank [F, M] from `low` Hz to half the rate: triangles on the mel axis, without the Nyquist bin."""
    position = 1127 * np.log1p(np.fft.rfftfreq(KALDI_FFT, 1 / RATE) / 700)
    bank = triangles(position, np.linspace(1127 * np.log1p(low / 700), position[-1], mels + 2))
    bank[-1] = 0
    return bank.astype(np.float32)

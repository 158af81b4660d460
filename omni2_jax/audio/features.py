"""Three spectra of recordings, time-major. B batch, N samples, T frames, M mel bins, F bins.

A spectrum takes recordings [B, N] in [-1, 1] and, where they are padded to a common N, their
`lengths` [B] in samples. Each row then gives the same numbers as alone, and zeros in the frames
behind its end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE, OUTPUT_RATE
from omni2_jax.models.layers import inside

Array = jax.Array

# Samples of a frame, between frames, and of the Fourier transform where that is longer.
WHISPER_FFT, WHISPER_HOP = 400, 160
SPEECH_FFT, SPEECH_HOP = 1920, 480
KALDI_FRAME, KALDI_HOP, KALDI_FFT = 400, 160, 512


@functools.partial(jax.jit, static_argnames="mels")
def log_mel(x: Array, lengths: Array | None = None, mels: int = 128) -> Array:
    """Whisper's log-mel at 16 kHz, [B, N] -> [B, N // 160, M].

    The speech encoder takes 480,000 samples at a time; shorter recordings are padded with zeros and
    no `lengths` are given, because Whisper's mel includes that silence. Reference:
    whisper.audio.log_mel_spectrogram.
    """
    frames = x.shape[1] // WHISPER_HOP
    windows = cut(mirror(x, lengths, WHISPER_FFT // 2), WHISPER_FFT, WHISPER_HOP, frames)
    spectrum = power(windows, hann(WHISPER_FFT))
    y = jnp.log10(jnp.maximum(project(spectrum, slaney_bank(INPUT_RATE, WHISPER_FFT, mels)), 1e-10))
    valid = None if lengths is None else inside(lengths // WHISPER_HOP, frames)[..., None]
    loudest = jnp.max(y, axis=(1, 2), keepdims=True, where=valid, initial=-10.0)
    return masked((jnp.maximum(y, loudest - 8) + 4) / 4, valid)


@functools.partial(jax.jit, static_argnames="mels")
def mel24k(x: Array, lengths: Array | None = None, mels: int = 80) -> Array:
    """The vocoder's log-mel at 24 kHz from 0 to 8 kHz, [B, N] -> [B, N // 480, M].

    Reference: matcha.utils.audio.mel_spectrogram.
    """
    frames = x.shape[1] // SPEECH_HOP
    margin = (SPEECH_FFT - SPEECH_HOP) // 2
    windows = cut(mirror(x, lengths, margin), SPEECH_FFT, SPEECH_HOP, frames)
    magnitude = jnp.sqrt(power(windows, hann(SPEECH_FFT)) + 1e-9)
    mel = project(magnitude, slaney_bank(OUTPUT_RATE, SPEECH_FFT, mels))
    valid = None if lengths is None else inside(lengths // SPEECH_HOP, frames)[..., None]
    return masked(jnp.log(jnp.maximum(mel, 1e-5)), valid)


@functools.partial(jax.jit, static_argnames=("mels", "subtract_mean"))
def fbank(
    x: Array, lengths: Array | None = None, mels: int = 80, subtract_mean: bool = True
) -> Array:
    """Kaldi's log filter bank at 16 kHz, [B, N] -> [B, fbank_frames(N), M].

    There is no dither, and the samples stay in [-1, 1], as CosyVoice feeds its speaker encoder.
    subtract_mean: subtract each bin's mean over time. Reference: torchaudio.compliance.kaldi.fbank.
    """
    frames = fbank_frames(x.shape[1])
    y = cut(x.astype(jnp.float32), KALDI_FRAME, KALDI_HOP, frames)
    y = y - y.mean(-1, keepdims=True)
    # Pre-emphasis; the sample before the first is the first itself.
    y = y - 0.97 * jnp.concatenate([y[..., :1], y[..., :-1]], -1)
    energy = project(power(y, povey(KALDI_FRAME), KALDI_FFT), kaldi_bank(mels))
    y = jnp.log(jnp.maximum(energy, np.finfo(np.float32).eps))
    valid = None if lengths is None else inside(fbank_frames(lengths), frames)[..., None]
    return masked(y - y.mean(1, keepdims=True, where=valid) if subtract_mean else y, valid)


def fbank_frames(samples):
    """The number of whole 25 ms frames, 10 ms apart, in `samples` (a number or an array)."""
    return (samples >= KALDI_FRAME) * (1 + (samples - KALDI_FRAME) // KALDI_HOP)


def masked(y: Array, valid: Array | None) -> Array:
    """`y` [B, T, M] with zeros where `valid` [B, T, 1] is false; None is true everywhere."""
    return y if valid is None else jnp.where(valid, y, 0.0)


def mirror(x: Array, lengths: Array | None, margin: int) -> Array:
    """[B, N] -> [B, N + 2 * margin]: each row is reflected about its first and last sample."""
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
    """Spectrum [B, T, F] through a filter bank [F, M] -> [B, T, M].

    In full float32 everywhere: the logarithm magnifies the rounding of quiet bins.
    """
    return jnp.einsum("btf,fm->btm", spectrum, bank, precision="highest")


@functools.cache
def hann(size: int) -> np.ndarray:
    """A periodic Hann window, float32 [size]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@functools.cache
def povey(size: int) -> np.ndarray:
    """Kaldi's default window, float32 [size]: a symmetric Hann to the power 0.85."""
    return ((0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85).astype(
        np.float32
    )


def triangles(position: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Triangular filters [F, M] for bins at `position` [F]; `corners` [M + 2].

    Filter m rises from corner m to corner m + 1 and falls to corner m + 2.
    """
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    rise = (position[:, None] - low) / (peak - low)
    fall = (high - position[:, None]) / (high - peak)
    return np.maximum(0, np.minimum(rise, fall))


@functools.cache
def slaney_bank(rate: int, n_fft: int, mels: int, top: float = 8000.0) -> np.ndarray:
    """Slaney's filter bank [F, M] from 0 to `top` Hz, each filter of unit area.

    The mel scale is linear below 1 kHz and logarithmic above. Reference: librosa.filters.mel.
    """
    knee, step = 1000 * 3 / 200, np.log(6.4) / 27
    mel = np.linspace(0, knee + np.log(top / 1000) / step, mels + 2)
    corners = np.where(mel < knee, mel * 200 / 3, 1000 * np.exp((mel - knee) * step))
    bank = triangles(np.fft.rfftfreq(n_fft, 1 / rate), corners) * 2 / (corners[2:] - corners[:-2])
    return bank.astype(np.float32)


@functools.cache
def kaldi_bank(mels: int, low: float = 20.0) -> np.ndarray:
    """Kaldi's filter bank [F, M] from `low` Hz to half of 16 kHz, for the bins of KALDI_FFT.

    The filters are triangles on the mel axis; the bin at half the rate has no weight.
    """
    position = 1127 * np.log1p(np.fft.rfftfreq(KALDI_FFT, 1 / INPUT_RATE) / 700)
    bank = triangles(position, np.linspace(1127 * np.log1p(low / 700), position[-1], mels + 2))
    bank[-1] = 0
    return bank.astype(np.float32)

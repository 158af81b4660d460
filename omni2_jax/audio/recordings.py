"""Sound files in and out, and spoken turns cut or padded to what the model hears. N samples."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

INPUT_RATE = 16000  # what the speech encoder, the speech tokenizer and the speaker encoder hear
OUTPUT_RATE = 24000  # what the vocoder speaks
TURN_SECONDS = 30  # Whisper's window
ENDLESS = 0x7FFF0000  # a wav that was written to a pipe claims this many bytes or more


def load(path: str | Path, rate: int = INPUT_RATE) -> np.ndarray:
    """Read a wav, flac or ogg file of any rate and channel count -> float32 [N], mono (channels averaged), at `rate` Hz.

    Raises ValueError, one line naming the file: missing, a directory, unreadable, not audio, cut short, empty, NaN or infinite.
    """
    try:
        content = Path(path).read_bytes()
        samples, source_rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"{path} is not audio that can be read (wav, flac or ogg): {getattr(error, 'error_string', error)}"
        ) from None
    claimed = 8 + int.from_bytes(content[4:8], "little")
    if content.startswith(b"RIFF") and len(content) < claimed < ENDLESS:
        raise ValueError(
            f"{path} is cut short: its header claims {claimed} bytes, it has {len(content)}"
        )
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


def save(path: str | Path, samples: np.ndarray, rate: int = OUTPUT_RATE) -> None:
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
        raise ValueError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] (clipped to it) as 16-bit integers."""
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def writable(path: str | Path) -> None:
    """Raise ValueError unless a file can be written at `path`: told before minutes are spent on what goes into it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"cannot write {path}: {path.parent} is not a directory that can be written to"
        )


class WavWriter:
    """Samples to a 16-bit wav as they come, or as raw little-endian PCM to stdout for "-"; nowhere for None.

    A context manager. The wav appears under its name when the block ends well, and not at all otherwise.
    """

    def __init__(self, path: str | Path | None, rate: int = OUTPUT_RATE):
        self.path, self.rate = path and Path(path), rate
        self.aside = self.path and self.path.with_name(self.path.name + ".partial")

    def __enter__(self) -> "WavWriter":
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


def fit(
    samples: np.ndarray,
    seconds: float = TURN_SECONDS,
    over: Literal["refuse", "truncate", "split"] = "refuse",
    rate: int = INPUT_RATE,
    name: str | Path = "the turn",
) -> list[np.ndarray]:
    """A clip [N] as clips of at most `seconds`: itself if it is short enough; else ValueError, its start, or consecutive pieces."""
    limit = round(seconds * rate)
    if over not in ("refuse", "truncate", "split"):
        raise ValueError(f"over is {over!r}; expected 'refuse', 'truncate' or 'split'")
    if len(samples) <= limit or over == "truncate":
        return [samples[:limit]]
    if over == "refuse":
        raise ValueError(
            f"{name} is {len(samples) / rate:.2f} s long; at most {seconds:g} s fit: truncate it, or split it"
        )
    return [samples[start : start + limit] for start in range(0, len(samples), limit)]


def pad(clips: Sequence[np.ndarray], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Clips of different lengths -> [B, size] with zeros behind them (default: the longest clip), and their lengths [B]."""
    lengths = np.array([len(clip) for clip in clips], np.int32)
    size = int(lengths.max()) if size is None else size
    return np.stack([np.pad(clip, (0, size - len(clip))) for clip in clips]).astype(
        np.float32
    ), lengths

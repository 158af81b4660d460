"""Sound files in and out; spoken turns cut or padded to what the speech encoder reads at once.

N samples, float32, mono. Files may be hostile: their length and rate are read from the header and
refused there, and they are decoded block by block, so that a false header costs neither time nor
memory.
"""

import contextlib
import io
import math
import os
import stat
import sys
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile
import soxr

from omni2_jax import files
from omni2_jax.audio import ogg

INPUT_RATE = 16000  # Hz, of the speech encoder, the speech tokenizer and the speaker encoder
OUTPUT_RATE = 24000  # Hz, of the vocoder
TURN_SECONDS = 30  # Whisper's window
TURN_SAMPLES = TURN_SECONDS * INPUT_RATE

MIN_RATE, MAX_RATE = 2000, 192_000  # Hz, of a file
MAX_SECONDS = 3600  # of a file: 230 MB as float32 at 16 kHz
MAX_SAMPLES = 2**30  # of a file, all channels together: an hour of 6 channels at 48 kHz
MAX_MAGNITUDE = 1e10  # of a sample; a power spectrum of larger ones comes near float32's 3e38
BLOCK = 2**20  # samples decoded at once, all channels together: 4 MB
# Seconds decoded after the end of a cut and dropped: the resampler looks ahead by less than this.
MARGIN = 1
PIPED = 0x7FFF0000  # a wav that was written to a pipe claims this many bytes or more
UNKNOWN = 2**62  # libsndfile reports a larger length for a file that does not state it

# Other formats are refused: libsndfile reads most of them as shorter ones where they are cut short.
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
NO_AUDIO = "is not audio that can be read"
# libsndfile decodes a damaged or shortened MP3 without an error, and prints to stderr. Where an MP3
# does not state its length, it is estimated from the bit rate of its first frame.
MP3 = "is an MP3, whose damage would not be noticed: convert it to wav, flac or ogg"


# ---- reading ----


@dataclass(frozen=True)
class SoundBytes:
    """A sound file in memory. name: stands for its path in messages."""

    content: bytes
    name: str

    def __str__(self) -> str:
        return self.name


Source = str | Path | SoundBytes  # a path, or the file's content


def load(
    path: Source,
    rate: int = INPUT_RATE,
    seconds: float = MAX_SECONDS,
    over: str = "refuse",
    mp3: bool = False,
) -> np.ndarray:
    """Read a wav, flac or ogg file of any rate and channel count: float32 [N] at `rate` Hz.

    Channels are averaged. seconds: the length allowed. over: "refuse" a longer file, or "truncate"
    it, which decodes no more than is kept. mp3: read an MP3, too; what is damaged or missing in it
    is not noticed, unless nothing can be read.

    Raises ValueError, one line naming the file, if it is missing, not a regular file, unreadable,
    not audio, an MP3 (but see `mp3`), cut short, empty, too long, of a rate outside MIN_RATE to
    MAX_RATE, or if a sample is not finite or beyond MAX_MAGNITUDE.
    """
    limit = round(seconds * rate)
    with open_audio(path, mp3) as file:
        check_header(file, path, seconds if over == "refuse" else None)
        samples = decode(file, path, rate, math.ceil((seconds + MARGIN) * file.samplerate))
    if len(samples) > limit and over == "refuse":
        raise too_long(path, len(samples) / rate, seconds)
    return check(samples[:limit], path)


def load_turn(
    path: str | Path, over: str = "refuse", window: int = TURN_SAMPLES
) -> list[np.ndarray]:
    """A spoken turn as segments of at most `window` samples at 16 kHz: `load`, then `fit`.

    A file that is to be refused, or cut, is not decoded further than `window`. Raises ValueError as
    these do.
    """
    if over == "split":
        return fit(load(path), over, window, path)
    samples = load(path, seconds=window / INPUT_RATE, over=over)
    return fit(samples, over, window, path)


@contextlib.contextmanager
def open_audio(path: Source, mp3: bool = False) -> Iterator[soundfile.SoundFile]:
    """An open sound file. Raises ValueError naming it, also for what fails in the block.

    mp3: whether it may be an MP3.
    """
    no_audio = f"{path} {NO_AUDIO} ({'wav, flac, ogg or mp3' if mp3 else 'wav, flac or ogg'})"
    try:
        with open_binary(path) as (file, size):
            if not size:
                raise ValueError(f"{no_audio}: it is empty")
            head = file.read(12)
            claimed = 8 + int.from_bytes(head[4:8], "big" if head[3:4] == b"X" else "little")
            if head.startswith((b"RIFF", b"RIFX")) and size < claimed < PIPED:
                raise ValueError(
                    f"{path} is cut short: its header claims {claimed} bytes, it has {size}"
                )
            if head.startswith(ogg.MAGIC) and not ogg.is_whole(file, size):
                raise ValueError(
                    f"{path} is cut short: its last page does not end the stream; if nothing is "
                    "missing, write it anew, for example with ffmpeg"
                )
            if not mp3 and is_mp3(file, head):
                raise ValueError(f"{path} {MP3}")
            file.seek(0)
            # By the file's number libsndfile reads it itself; threads need not wait for Python.
            source = file if isinstance(file, io.BytesIO) else file.fileno()
            with soundfile.SoundFile(source, closefd=False) as sound:
                if not mp3 and (sound.format == "MP3" or sound.subtype.startswith("MPEG")):
                    raise ValueError(f"{path} {MP3}")
                if sound.format not in (*FORMATS, "MP3"):
                    raise ValueError(f"{no_audio}: its format is {sound.format}")
                yield sound
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except soundfile.SoundFileError as error:
        reason = " ".join(str(getattr(error, "error_string", error)).split())
        raise ValueError(f"{no_audio}: {reason}") from None


@contextlib.contextmanager
def open_binary(path: Source) -> Iterator[tuple[io.BytesIO | io.FileIO, int]]:
    """An open file of bytes, and its size. Raises ValueError unless it is a regular file."""
    if isinstance(path, SoundBytes):
        yield io.BytesIO(path.content), len(path.content)
        return
    check_regular(path)
    with open(path, "rb", buffering=0) as file:
        yield file, os.fstat(file.fileno()).st_size


def check_regular(path: str | Path) -> None:
    """Raise ValueError unless `path` is a regular file.

    Opening a pipe can wait for ever; a device has no end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a null byte, or half a character
        raise ValueError(f"{str(path)!r} cannot be a file's name: {error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path}: Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")


def is_mp3(file, head: bytes) -> bool:
    """Whether an open file whose first bytes are `head` is an MP3; an ID3 tag may precede it."""
    if head.startswith(b"ID3") and len(head) >= 10:
        size = 0
        for byte in head[6:10]:  # 7 bits each
            size = size << 7 | byte & 0x7F
        file.seek(10 + size)
        head = file.read(4)
        return head != b"fLaC"
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0


def check_header(file: soundfile.SoundFile, path: Source, seconds: float | None) -> None:
    """Raise ValueError if a file's rate or length is not allowed. seconds: None allows any."""
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise ValueError(
            f"{path} has {file.samplerate} samples a second; expected {MIN_RATE} to {MAX_RATE}"
        )
    if file.frames >= UNKNOWN:
        raise ValueError(f"{path} does not state how long it is, as if it was written to a pipe")
    if seconds is None:
        return
    if file.frames > (seconds + MARGIN) * file.samplerate:
        raise too_long(path, file.frames / file.samplerate, seconds)
    if file.frames * file.channels > MAX_SAMPLES:
        raise ValueError(
            f"{path} holds {file.frames} samples in {file.channels} channels; at most "
            f"{MAX_SAMPLES} in all are read"
        )


def decode(file: soundfile.SoundFile, path: Source, rate: int, frames: int) -> np.ndarray:
    """At most the first `frames` samples of every channel: averaged, float32 [N] at `rate` Hz.

    Raises ValueError naming `path` if a sample is not finite or beyond MAX_MAGNITUDE.
    """
    frames = min(frames, file.frames)
    size = max(1, BLOCK // file.channels)
    resampler = None  # for several blocks; it gives the same numbers as `resample`, more slowly
    if file.samplerate != rate and frames > size:
        resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ")
    blocks: list[np.ndarray] = []
    total = bad = 0
    peak = 0.0
    while frames:
        block = file.read(min(size, frames), dtype="float32", always_2d=True)
        if not len(block):  # the header claims more than there is
            break
        frames -= len(block)
        total += block.size
        block_bad, block_peak = extremes(block)
        bad, peak = bad + block_bad, max(peak, block_peak)
        with np.errstate(invalid="ignore", over="ignore"):  # `bad` counts what makes these
            mono = block.mean(axis=1)
        blocks.append(resampler.resample_chunk(mono) if resampler else mono)
    check_values(total, bad, peak, path)
    if not resampler:
        return resample(np.concatenate(blocks), file.samplerate, rate)
    blocks.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(blocks)


def check(samples: np.ndarray, name: Source) -> np.ndarray:
    """The samples [N] themselves.

    Raises ValueError, beginning with `name`, if there are none, if they have another number of
    dimensions, or if one is not finite or beyond MAX_MAGNITUDE.
    """
    if samples.ndim != 1:
        raise ValueError(f"{name}: shape {list(samples.shape)}, expected one dimension")
    check_values(samples.size, *extremes(samples), name)
    return samples


def extremes(samples: np.ndarray) -> tuple[int, float]:
    """The number of NaN or infinite samples; and, if there are none, the largest magnitude."""
    peak = float(np.max(np.abs(samples), initial=0))  # NaN if one sample is
    if math.isfinite(peak):
        return 0, peak
    return int(np.count_nonzero(~np.isfinite(samples))), 0.0


def check_values(total: int, bad: int, peak: float, name: Source) -> None:
    """Raise ValueError for no samples, for `bad` ones of `total`, and for too large a `peak`."""
    if not total:
        raise ValueError(f"{name} is empty: it holds no samples")
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite samples of {total}")
    if peak > MAX_MAGNITUDE:
        raise ValueError(
            f"{name} holds samples of up to {peak:.1e}; expected -1 to 1, and never beyond "
            f"{MAX_MAGNITUDE:.0e}"
        )


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Samples [N] at `source` Hz -> [N * target / source] at `target` Hz (soxr, high quality)."""
    return samples if source == target else soxr.resample(samples, source, target, quality="HQ")


# ---- 16-bit samples ----


def to_int16(samples: np.ndarray, scale: int = 32768) -> np.ndarray:
    """Samples in [-1, 1], and clipped to it, as int16. Those from `from_int16` come back exactly.

    scale: the value of 1.0. With 32767 it is represented, as in the wav files written here.
    """
    return np.clip(np.round(samples * scale), -scale, 32767).astype(np.int16)


def from_int16(values):
    """Array of int16 (NumPy's or JAX's) -> float32 in [-1, 1)."""
    return values.astype(np.float32) / 32768


# ---- writing ----


def encode(samples: np.ndarray, rate: int) -> bytes:
    """Samples [N] in [-1, 1] as FLAC, 16-bit: those of a 16-bit file come back bit for bit."""
    content = io.BytesIO()
    soundfile.write(content, to_int16(samples), rate, format="FLAC", subtype="PCM_16")
    return content.getvalue()


def save(path: str | Path, samples: np.ndarray, rate: int = OUTPUT_RATE) -> None:
    """Write samples [N] in [-1, 1] (clipped to it) as a 16-bit mono wav.

    The file appears whole or not at all. Raises ValueError, one line naming the file, if it cannot
    be written or if the samples do not pass `check`.
    """
    samples = check(np.asarray(samples, np.float32), path)
    with WavWriter(path, rate) as writer:
        writer.write(samples)


def wav_bytes(samples: np.ndarray, rate: int = OUTPUT_RATE) -> bytes:
    """Samples [N] in [-1, 1] (clipped to it) as a 16-bit mono wav in memory.

    Samples of a 16-bit file come back exactly. Raises ValueError if they do not pass `check`.
    """
    buffer = io.BytesIO()
    values = to_int16(check(np.asarray(samples, np.float32), "the samples"))
    soundfile.write(buffer, values, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def check_writable(path: str | Path) -> None:
    """Raise ValueError unless a file can be written at `path`.

    For use before the minutes that its content takes. A file is created beside it for a moment.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        raise ValueError(f"cannot write {path}: it is a directory")
    if not os.path.isdir(path.parent):
        raise ValueError(f"cannot write {path}: {path.parent} is not a directory")
    probe = path.with_name(f".{path.name}.{os.getpid()}.partial")  # as `files.atomic_write` does
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


class WavWriter:
    """Writes samples in [-1, 1] as they come: to a 16-bit mono wav at `path`; for "-" as raw 16-bit
    little-endian PCM to stdout; for None nowhere.

    A context manager. The wav appears under its name when the block ends without an error, and not
    at all otherwise. Raises ValueError naming the file if it cannot be written.
    """

    def __init__(self, path: str | Path | None, rate: int = OUTPUT_RATE):
        self.path, self.rate = path, rate
        self.to_stdout = str(path) == "-"
        self.wav: wave.Wave_write | None = None

    def __enter__(self) -> "WavWriter":
        with contextlib.ExitStack() as stack:
            if self.path is not None and not self.to_stdout:
                check_writable(self.path)
                file = stack.enter_context(files.atomic_write(Path(self.path), "wb"))
                self.wav = stack.enter_context(wave.open(file, "wb"))
                self.wav.setparams((1, 2, self.rate, 0, "NONE", ""))
            self.stack = stack.pop_all()
        return self

    def write(self, samples: np.ndarray) -> None:
        """Append samples [N]."""
        pcm = to_int16(samples, 32767).astype("<i2").tobytes()
        if self.wav:
            self.wav.writeframesraw(pcm)
        elif self.to_stdout:
            sys.stdout.buffer.write(pcm)
            sys.stdout.buffer.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stack.__exit__(kind, error, traceback)


# ---- turns ----


def fit(
    samples: np.ndarray,
    over: str = "refuse",
    window: int = TURN_SAMPLES,
    name: str | Path = "the turn",
) -> list[np.ndarray]:
    """Samples [N] at 16 kHz as segments of at most `window` samples.

    over: what becomes of more samples: "refuse" raises ValueError, which begins with `name`;
    "truncate" keeps the first `window`; "split" gives consecutive segments. Raises ValueError for
    another `over`.
    """
    if over not in ("refuse", "truncate", "split"):
        raise ValueError(f"over is {over!r}; expected 'refuse', 'truncate' or 'split'")
    if len(samples) <= window or over == "truncate":
        return [samples[:window]]
    if over == "refuse":
        raise too_long(name, len(samples) / INPUT_RATE, window / INPUT_RATE)
    return [samples[start : start + window] for start in range(0, len(samples), window)]


def too_long(name: Source, seconds: float, limit: float) -> ValueError:
    """The error for a recording of `seconds` where at most `limit` are allowed."""
    return ValueError(
        f"{name} is {seconds:.2f} s long; at most {limit:g} s fit: truncate it, or split it"
    )


def pad(waves: Sequence[np.ndarray], size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Samples [N] of any lengths -> float32 [B, size] with zeros behind them, and the lengths [B].

    size: None is the largest length.
    """
    lengths = np.array([len(row) for row in waves], np.int32)
    size = int(lengths.max()) if size is None else size
    padded = np.stack([np.pad(row, (0, size - len(row))) for row in waves])
    return padded.astype(np.float32), lengths

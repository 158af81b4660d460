"""Audio formats of the API: bytes of a client <-> the model's samples."""

import asyncio
import base64
import binascii
import contextlib
import io
import tempfile
from collections.abc import Iterator

import numpy as np
import soundfile

from omni2_jax.audio import recordings
from omni2_jax.audio.recordings import INPUT_RATE, OUTPUT_RATE
from omni2_jax.audio.resampler import Resampler

# The API's names: sample rate and the name of the encoding in libsndfile.
FORMATS = {
    "audio/pcm": (24_000, "PCM_16"),
    "audio/pcmu": (8_000, "ULAW"),
    "audio/pcma": (8_000, "ALAW"),
}
LONG = 16_000  # bytes; 2 s at 8 kHz, which take about 5 ms to decode
# Formats of a whole answer: libsndfile's container and encoding, and the media type.
CONTAINERS = {
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "mp3": ("MP3", "MPEG_LAYER_III", "audio/mpeg"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
}


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 text. Raises ValueError if it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the audio is not base64: {error}") from None


class Decoder:
    """Bytes of a client's audio as they arrive -> samples at 16 kHz.

    Raises ValueError for a format that is not in FORMATS.
    """

    def __init__(self, name: str):
        if name not in FORMATS:
            raise ValueError(f"audio format {name!r}, expected one of {', '.join(FORMATS)}")
        self.rate, self.encoding = FORMATS[name]
        self.resampler = Resampler(self.rate, INPUT_RATE)
        self.odd_byte = b""  # half of a 16-bit sample, whose other half comes with the next bytes

    def __call__(self, data: bytes, last: bool = False) -> np.ndarray:
        """Samples [N] float32 at 16 kHz; the resampler keeps a few until `last`."""
        data = self.odd_byte + data
        self.odd_byte = b""
        if self.encoding == "PCM_16" and len(data) % 2:
            data, self.odd_byte = data[:-1], data[-1:]
        samples = read_raw(data, self.encoding, self.rate)
        return self.resampler(samples, last=last)


async def decode(decoder: Decoder, data: bytes, last: bool = False) -> np.ndarray:
    """What `decoder(data, last)` returns. Long audio is decoded in a thread, beside other clients.

    15 MiB, the most that an event may have, take more than a second.
    """
    if len(data) < LONG:
        return decoder(data, last)
    return await asyncio.to_thread(decoder, data, last)


class Encoder:
    """The model's samples at 24 kHz as they are generated -> bytes for a client.

    Raises ValueError for a format that is not in FORMATS.
    """

    def __init__(self, name: str):
        if name not in FORMATS:
            raise ValueError(f"audio format {name!r}, expected one of {', '.join(FORMATS)}")
        self.rate, self.encoding = FORMATS[name]
        self.resampler = Resampler(OUTPUT_RATE, self.rate)

    def __call__(self, samples: np.ndarray, last: bool = False) -> bytes:
        """The bytes of samples [N]; the resampler keeps a few until `last`."""
        if self.rate != OUTPUT_RATE:
            samples = self.resampler(samples.astype(np.float32), last=last)
        return write_raw(samples, self.encoding, self.rate)


def encode_file(samples: np.ndarray, name: str) -> bytes:
    """A sound file of samples [N] at 24 kHz in one of CONTAINERS."""
    container, encoding, _ = CONTAINERS[name]
    file = io.BytesIO()
    clipped = np.clip(samples, -1.0, 1.0)
    soundfile.write(file, clipped, OUTPUT_RATE, format=container, subtype=encoding)
    return file.getvalue()


@contextlib.contextmanager
def private_file(data: bytes) -> Iterator[str]:
    """The path of a temporary file with a client's bytes, which only this user can read.

    The message of a ValueError in the block does not tell the path.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            yield file.name
        except ValueError as error:
            raise ValueError(str(error).replace(file.name, "the audio")) from None


def decode_file(data: bytes, seconds: float) -> np.ndarray:
    """Samples [N] at 16 kHz of a sound file: wav, mp3, flac or ogg, whatever the client calls it.

    Raises ValueError if it cannot be decoded or is longer than so many seconds.
    """
    with private_file(data) as path:
        return recordings.load(path, seconds=seconds, mp3=True)


def read_raw(data: bytes, encoding: str, rate: int) -> np.ndarray:
    """Samples [N] float32 of headerless audio in libsndfile's `encoding`."""
    if not data:
        return np.zeros(0, np.float32)
    samples, _ = soundfile.read(
        io.BytesIO(data),
        dtype="float32",
        samplerate=rate,
        channels=1,
        format="RAW",
        subtype=encoding,
        endian="LITTLE" if encoding == "PCM_16" else "FILE",
    )
    return samples


def write_raw(samples: np.ndarray, encoding: str, rate: int) -> bytes:
    """Samples [N] as headerless audio in libsndfile's `encoding`, clipped to [-1, 1]."""
    file = io.BytesIO()
    soundfile.write(
        file,
        np.clip(samples, -1.0, 1.0),
        rate,
        format="RAW",
        subtype=encoding,
        endian="LITTLE" if encoding == "PCM_16" else "FILE",
    )
    return file.getvalue()

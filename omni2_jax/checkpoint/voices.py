"""Voices of a checkpoint: x-vectors [192] by name, CKPT/voices/NAME.npy.

An x-vector is made from a few seconds of speech. The flow speaks in the voice that it describes.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config, SpeakerConfig
from omni2_jax.files import atomic_write, first_line, sha256
from omni2_jax.models.speaker import check_length, embed

# Seconds that a recording is padded to, up to the most that counts. What is padded changes nothing,
# and each length compiles a program.
LENGTHS = (5, 15, 30)


def names(directory: Path) -> list[str]:
    """The voices that a checkpoint holds."""
    return sorted(path.stem for path in (directory / "voices").glob("*.npy"))


def save(directory: Path, name: str, x_vector: np.ndarray) -> None:
    """Store a voice. Raises ValueError if it cannot be written."""
    folder = directory / "voices"
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / f"{name}.npy", "wb") as file:
        np.save(file, np.asarray(x_vector, np.float32))


def resolve(directory: Path, config: Omni2Config, voice: str | None) -> np.ndarray:
    """The x-vector [192] of a stored voice's name, of a prompt file, or (None) of the first voice.

    A flow of one voice has the x-vector [1], and takes no name. Raises ValueError if there is none,
    or its file is damaged.
    """
    if config.flow and config.flow.speaker == 1:
        if voice is not None:
            raise ValueError(f"voice {voice!r}: the flow of {directory} has one voice; name none")
        return np.ones(1, np.float32)
    stored = names(directory)
    if voice is None and stored:
        voice = stored[0]
    if voice in stored:
        return load(directory / "voices" / f"{voice}.npy", config)
    if voice is not None and Path(voice).is_file():
        return from_file(directory, config, Path(voice))
    known = (
        f"it has {', '.join(stored)}"
        if stored
        else "it has none (add one with: omni2 convert --voice NAME=prompt.wav --out CKPT)"
    )
    if voice:
        raise ValueError(f"voice {voice!r} is neither a file nor a voice of {directory}; {known}")
    raise ValueError(f"{directory} needs a voice; {known}")


def checksum(directory: Path, voice: str | None) -> str | None:
    """The checksum of a prompt file; None for what `resolve` finds in the checkpoint itself."""
    if voice is None or voice in names(directory) or not Path(voice).is_file():
        return None
    return sha256(Path(voice))


def from_file(directory: Path, config: Omni2Config, path: Path) -> np.ndarray:
    """The x-vector [192] of a .npy that holds one, or of a sound file.

    The checkpoint's speaker encoder embeds the first 30 s of a sound. Raises ValueError naming the
    file if it is neither, or the checkpoint if it has no speaker encoder.
    """
    if path.suffix == ".npy":
        return load(path, config)
    if config.speaker is None:
        raise ValueError(
            f"{directory} has no speaker encoder (campplus.onnx was not converted), "
            f"so {path} cannot become a voice"
        )
    (wav,) = recordings.load_turn(path, "truncate")
    graph, params = parameters.load(directory, config.only("speaker"), jnp.float32)
    speaker, length = nnx.merge(graph, params).speaker, len(wav)
    check_length(length)
    padded = next(n for n in (s * recordings.INPUT_RATE for s in LENGTHS) if n >= length)
    wav = np.pad(wav, (0, padded - length))
    return np.asarray(embed(speaker, jnp.asarray(wav)[None], jnp.array([length]))[0])


def load(path: Path, config: Omni2Config) -> np.ndarray:
    """Read an x-vector from a .npy file -> float32 [192], or the size that `config.flow` states.

    Raises ValueError naming the file unless it holds so many finite numbers. The header is checked
    before the values are read, because it may promise more than fits into memory.
    """
    size = config.flow.speaker if config.flow else SpeakerConfig.embedding
    try:
        with path.open("rb") as file:
            shape, dtype = read_header(file)
            if math.prod(shape) != size or dtype.kind not in "fiu":
                raise ValueError(f"an array of shape {list(shape)} and type {dtype}")
            file.seek(0)
            x_vector = np.load(file, allow_pickle=False).reshape(-1).astype(np.float32)
        if not np.isfinite(x_vector).all():
            raise ValueError("an array with NaN or infinite numbers")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged header raises many kinds
        raise ValueError(
            f"{path} is not an x-vector of {size} finite numbers: it holds {first_line(error)}"
        ) from None
    return x_vector


def read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an open .npy file. Raises ValueError if it is none."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array file of version {version[0]}.{version[1]}")
    shape, _, dtype = readers[version](file)
    return shape, dtype

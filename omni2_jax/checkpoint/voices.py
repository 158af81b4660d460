"""Voices of a checkpoint: x-vectors [192] by name, made from a few seconds of somebody's speech, which the flow speaks like."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config, SpeakerConfig
from omni2_jax.files import atomic_write
from omni2_jax.models.speaker import embed


def names(directory: Path) -> list[str]:
    """The voices that a checkpoint holds."""
    return sorted(path.stem for path in (directory / "voices").glob("*.npy"))


def save(directory: Path, name: str, x_vector: np.ndarray) -> None:
    """Store a voice, whole or not at all."""
    folder = directory / "voices"
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / f"{name}.npy", "wb") as file:
        np.save(file, np.asarray(x_vector, np.float32))


def resolve(directory: Path, config: Omni2Config, voice: str | None) -> np.ndarray:
    """The x-vector of a stored voice's name, a prompt file, or (None) the first stored one. Raises ValueError saying what there is."""
    stored = names(directory)
    if voice is None and stored:
        voice = stored[0]
    if voice in stored:
        return np.load(directory / "voices" / f"{voice}.npy")
    if voice is not None and Path(voice).is_file():
        return from_file(directory, config, Path(voice))
    known = (
        f"it has {', '.join(stored)}"
        if stored
        else "it has none (add one with: python -m convert --voice NAME=prompt.wav --out CKPT)"
    )
    asked = (
        f"voice {voice!r} is neither a file nor a voice of {directory}"
        if voice
        else f"{directory} has no voice"
    )
    raise ValueError(f"{asked}; {known}" if voice else f"{directory} needs a voice; {known}")


def from_file(directory: Path, config: Omni2Config, path: Path) -> np.ndarray:
    """The x-vector of a prompt: a .npy that holds one, or a sound file, embedded by the checkpoint's speaker encoder."""
    if path.suffix == ".npy":
        size = (config.flow.speaker if config.flow else SpeakerConfig.embedding,)
        try:
            x_vector = np.load(path, allow_pickle=False).reshape(-1)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a numpy array file: {error}") from None
        if x_vector.shape != size or not np.isfinite(x_vector).all():
            raise ValueError(
                f"{path} holds an array of {x_vector.size} numbers, expected an x-vector of {size[0]} finite ones"
            )
        return x_vector.astype(np.float32)
    if config.speaker is None:
        raise ValueError(
            f"{directory} has no speaker encoder (campplus.onnx was not converted), so {path} cannot become a voice"
        )
    (wav,) = recordings.load_turn(path, "truncate")
    graph, params = parameters.load(directory, config.only("speaker"), jnp.float32)
    return np.asarray(embed(nnx.merge(graph, params).speaker, jnp.asarray(wav)[None])[0])

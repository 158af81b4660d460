"""Parameters of a Whisper encoder that the speech tokenizer can start from."""

from pathlib import Path

import numpy as np

from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.models import speech_tokenizer

BLOCKS = "blocks."  # these paths hold a parameter of all layers, [layers, ...]


def matching(directory: Path, config: SpeechTokenizerConfig) -> dict[str, LazyArray]:
    """Parameters of the tokenizer, by path, that a checkpoint's speech encoder has as well.

    Of its blocks the first ones are taken. Raises ValueError naming the checkpoint if it has no
    speech encoder, or if not even the matrices of the blocks have the shape of the tokenizer's.
    """
    if "speech_encoder" not in parameters.parts(directory):
        raise ValueError(f"{directory} has no speech encoder; omni2 convert --whisper makes one")
    stored = parameters.stored(directory, "speech_encoder")
    shapes = parameters.flatten(speech_tokenizer.abstract(config)[1])
    found = {
        path: first(stored[path], shape.shape[0])
        for path, shape in shapes.items()
        if path in stored and fits(path, stored[path].shape, shape.shape)
    }
    if f"{BLOCKS}up.kernel" not in found:
        widths = [shape[f"{BLOCKS}up.kernel"].shape[1] for shape in (stored, shapes)]
        raise ValueError(
            f"{directory}: the speech encoder has a width of {widths[0]}, or other layers;"
            f" expected the speech tokenizer's width of {widths[1]} and at least as many layers"
        )
    return found


def fits(path: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes agree; of blocks there may be more than are wanted."""
    if path.startswith(BLOCKS):
        return stored[1:] == wanted[1:] and stored[0] >= wanted[0]
    return stored == wanted


def first(array: LazyArray, count: int) -> LazyArray:
    """The first `count` entries along the first axis: layers, or all of what is not stacked."""

    def read() -> np.ndarray:
        return array.read()[:count]

    return LazyArray((count, *array.shape[1:]), array.dtype, read)

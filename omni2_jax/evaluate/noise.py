"""Questions in noise: what a system still hears where it is not quiet."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import Item
from omni2_jax.files import atomic_write
from omni2_jax.synthesize.augment import changed


def in_noise(items: Sequence[Item], ratio: float, seed: int, folder: Path) -> list[Item]:
    """The items with noise in every recording of the user; the new recordings go to `folder`.

    ratio: the signal-to-noise ratio in dB, of the mean powers of a recording. The noise lies
    between white and brown, and follows from the seed and the item's name. Raises ValueError,
    naming it, for a recording that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noisy = []
    for item in items:
        turns = list(item.turns)
        for index, sound in enumerate(turns):
            if isinstance(sound, Path):
                rng = np.random.default_rng([seed, index, *item.name.encode()])
                samples = recordings.load(sound)
                samples = changed(samples, recordings.INPUT_RATE, {"noise": ratio}, rng)
                turns[index] = path = folder / f"{item.name}-{index}.wav"
                with atomic_write(path, "wb") as file:
                    file.write(recordings.wav_bytes(samples, recordings.INPUT_RATE))
        noisy.append(dataclasses.replace(item, turns=tuple(turns)))
    return noisy

"""Units of many recordings, in batches of a few fixed shapes."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.models.speech_tokenizer import SpeechTokenizer, tokenize

# Seconds that a batch of recordings is padded to; over 30 s to 60, 120, 240 and so on.
BATCH_SECONDS = (3, 6, 10, 15, 20, 30)

Item = TypeVar("Item")


def batched_units(
    tokenizer: SpeechTokenizer, wavs: Sequence[np.ndarray], batch: int
) -> list[np.ndarray]:
    """The units int32 [U] of each recording [N] at 16 kHz.

    Recordings of like length share a batch, and batches have one of a few shapes.
    """
    order = sorted(range(len(wavs)), key=lambda index: len(wavs[index]))
    running = []
    for indices in batches(order, batch):
        size = fixed_length(len(wavs[indices[-1]]))
        padded, lengths = recordings.pad([wavs[index] for index in indices], size)
        empty = (0, batch - len(indices))
        padded = jnp.asarray(np.pad(padded, (empty, (0, 0))))
        codes = tokenize(tokenizer, padded, jnp.asarray(np.pad(lengths, empty)))
        running.append((indices, codes))
    units: dict[int, np.ndarray] = {}
    for indices, (codes, counts) in running:  # fetched when all are dispatched
        codes, counts = np.asarray(codes), np.asarray(counts)
        units |= {index: codes[row, : counts[row]] for row, index in enumerate(indices)}
    return [units[index] for index in range(len(wavs))]


def fixed_length(samples: int) -> int:
    """The samples that a batch is padded to whose longest recording has `samples`."""
    for seconds in BATCH_SECONDS:
        if samples <= seconds * recordings.INPUT_RATE:
            return seconds * recordings.INPUT_RATE
    size = BATCH_SECONDS[-1] * recordings.INPUT_RATE
    while size < samples:
        size *= 2
    return size


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch

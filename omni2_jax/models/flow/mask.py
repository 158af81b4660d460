"""Chunked attention masks: which frames a frame of the flow attends to.

B rows, T frames that a call computes (queries), S frames that they may attend to (keys).
"""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from omni2_jax.models.layers import MASKED

Array = jax.Array


@dataclass(frozen=True)
class Chunks:
    """A unit attends to its own chunk of `size` units and to `left` chunks before it (None: all).

    The first chunk is `shift` units shorter. With shift = look-ahead, units that arrive `size` at
    a time complete exactly one chunk each time. Example: size 3, left 1, shift 1.

        In:  unit     0 1 2 3 4 5 6 7
        Out: chunk    0 0 1 1 1 2 2 2
             unit 1 sees  x x . . . . . .
             unit 2 sees  x x x x x . . .
             unit 7 sees  . . x x x x x x

    `size` may be a traced number: training draws it. Raises ValueError if size, left or shift is
    out of range.
    """

    size: int | Array
    left: int | None = None
    shift: int = 0

    def __post_init__(self):
        if isinstance(self.size, int) and (
            self.size < 1 or not 0 <= self.shift < self.size or (self.left or 0) < 0
        ):
            raise ValueError(
                f"{self}: expected size >= 1, left >= 0 or None, and shift from 0 to size - 1"
            )

    def end(self, unit: Array | int) -> Array | int:
        """The first unit after the chunk that contains `unit` (any shape)."""
        return ((unit + self.shift) // self.size + 1) * self.size - self.shift

    def visible(self, query: Array, key: Array, rate: int) -> Array:
        """Whether frame query[b, t] attends to frame key[b, s] -> bool [B, T, S].

        query [B, T] and key [B, S] are frame indices, `rate` frames to a unit; a key of -1 is an
        empty place and is never visible.
        """
        query_end = self.end(query[:, :, None] // rate)
        key_end = self.end(key[:, None, :] // rate)
        visible = (key_end <= query_end) & (key >= 0)[:, None, :]
        if self.left is None:
            return visible
        return visible & (key_end >= query_end - self.left * self.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The frames that one call computes, and the frames that they attend to.

    Without a cache, the keys are the window's own frames and the last three fields are not set.
    With one, the keys are the places of its ring (cache.py).
    """

    valid: Array  # [B, T] bool: the frame exists
    query: Array  # [B, T] index of each frame in its utterance
    key: Array  # [B, S] index of each key, -1 for an empty place
    bias: Array  # [B, 1, T, S] float32: 0 where a frame attends to a key, MASKED elsewhere
    num_keys: Array  # [B] how many of the first keys include every visible one
    ring_start: Array | None = None  # [B] place of the ring where the window's first key is written
    num_finished: Array | None = None  # [B] first frames of the window that will not change again
    read_sizes: tuple[int, ...] = field(
        default=(), metadata={"static": True}
    )  # places that attention may read

    @classmethod
    def build(cls, query: Array, key: Array, length: Array, chunks: Chunks, rate: int) -> "Window":
        """Frames `query` [B, T] that attend to keys `key` [B, S], `rate` frames to a unit.

        length [B]: frames of each utterance so far; later frames are padding.
        """
        visible = chunks.visible(query, key, rate) & (key < length[:, None])[:, None]
        place = jnp.arange(1, key.shape[1] + 1)
        return cls(
            valid=query < length[:, None],
            query=query,
            key=key,
            bias=jnp.where(visible, 0.0, MASKED)[:, None],
            num_keys=jnp.max(jnp.where(visible.any(1), place, 0), 1),
        )

    @classmethod
    def whole(cls, frames: int, length: Array, chunks: Chunks, rate: int) -> "Window":
        """All `frames` frames of right-padded utterances of `length` [B] frames."""
        index = jnp.broadcast_to(jnp.arange(frames), (length.shape[0], frames))
        return cls.build(index, index, length, chunks, rate)

    def first(self, frames: int) -> "Window":
        """The window of its first `frames` frames, with the same keys."""
        return dataclasses.replace(
            self,
            valid=self.valid[:, :frames],
            query=self.query[:, :frames],
            bias=self.bias[:, :, :frames],
        )

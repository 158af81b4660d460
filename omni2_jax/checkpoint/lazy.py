"""Parameters that are read only while they are being written, so that one of them is in memory at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import orbax.checkpoint as ocp

CHUNK_BYTES = 8 * 2**20  # tensorstore's unit of reading and writing
FILE_BYTES = 4 * CHUNK_BYTES  # tensorstore holds compressed chunks in memory until they fill a file


@dataclass(frozen=True)
class LazyArray:
    """A parameter that is read only while it is being written: its shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves `LazyArray` leaves one after the other, so that one large parameter, or a few small ones, are in memory at a time."""

    def __init__(self, written: Callable[[LazyArray], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.written = written
        self.failures: list[Exception] = []

    async def serialize(self, values, infos, args=None):
        for some in batches(values):
            await super()._background_serialize(
                [value.read() for value in values[some]], infos[some], args[some]
            )
            if self.failures:
                raise self.failures[0]
            for value in values[some]:
                self.written(value)
        return []  # nothing is left to a background thread, so what goes wrong is raised here

    async def _open_and_write(self, value, tspec, ts_context):
        # Orbax cuts axes into divisors only, and the 158227 tokens of the speech LM, a prime, into single rows.
        tspec["metadata"]["chunks"] = chunk_shape(value.shape, value.dtype.itemsize)
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except (
            Exception
        ) as error:  # of many kinds; the writes beside this one have to end before it is raised
            self.failures.append(error)


def chunk_shape(shape: Sequence[int], itemsize: int) -> list[int]:
    """Contiguous pieces of an array, of CHUNK_BYTES at most: the first axes are cut, the last ones whole."""
    chunk = []
    for axis, size in enumerate(shape):
        most = max(1, min(size, CHUNK_BYTES // max(1, itemsize * math.prod(shape[axis + 1 :]))))
        # Pieces that go into the axis evenly are compressed without a copy.
        chunk.append(next((even for even in range(most, most // 2, -1) if size % even == 0), most))
    return chunk


def batches(leaves: Sequence[LazyArray]) -> Iterator[slice]:
    """Slices of CHUNK_BYTES together at most, or of one larger leaf. Each is a commit, and a commit of tiny leaves is mostly overhead."""
    start, size = 0, 0
    for i, leaf in enumerate(leaves):
        if i > start and size + leaf.nbytes > CHUNK_BYTES:
            yield slice(start, i)
            start, size = i, 0
        size += leaf.nbytes
    yield slice(start, len(leaves))


def as_lazy(leaf: LazyArray | np.ndarray | jax.Array) -> LazyArray | jax.Array:
    """An array that this process holds whole as one to be copied to the host when its turn comes; others Orbax writes in shards."""
    if isinstance(leaf, LazyArray) or not getattr(leaf, "is_fully_addressable", True):
        return leaf
    return LazyArray(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))

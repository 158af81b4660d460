"""Parameters that are read only while they are being written, one at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
import orbax.checkpoint as ocp

CHUNK_BYTES = 8 * 2**20  # tensorstore's unit of reading and writing
# tensorstore holds compressed chunks in memory until they fill a file.
FILE_BYTES = 4 * CHUNK_BYTES


@dataclass(frozen=True)
class LazyArray:
    """A parameter in a file: its shape and dtype are known, `read` returns its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves `LazyArray` leaves in batches of one large parameter, or of a few small ones.

    No more than one batch is in memory. written: called after each parameter that was written.
    """

    def __init__(self, written: Callable[[LazyArray], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.written = written
        self.failures: list[Exception] = []

    async def serialize(self, values, infos, args=None):
        leaves = cast(Sequence[LazyArray], values)
        for batch in batches(leaves):
            # No name for the arrays: it would keep them while the next batch is read.
            await super()._background_serialize(
                [leaf.read() for leaf in leaves[batch]], infos[batch], args and args[batch]
            )
            if self.failures:
                raise self.failures[0]
            for leaf in leaves[batch]:
                self.written(leaf)
        return []  # nothing is left to a background thread, so that errors are raised here

    async def _open_and_write(self, value, tspec, ts_context):
        # Orbax cuts axes into divisors only. The vocabulary of the speech LM, 158227, is a prime
        # and would be cut into single rows.
        grid = tspec["metadata"]["chunk_grid"]["configuration"]
        grid["chunk_shape"] = chunk_shape(value.shape, value.dtype.itemsize)
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except (
            Exception
        ) as error:  # raised by `serialize`, when the batch's other writes have ended
            self.failures.append(error)


def chunk_shape(shape: Sequence[int], itemsize: int) -> list[int]:
    """The shape of contiguous pieces of an array, of CHUNK_BYTES at most.

    The first axes are cut and the last ones are whole.
    """
    chunk = []
    for axis, size in enumerate(shape):
        row_bytes = itemsize * math.prod(shape[axis + 1 :])
        limit = max(1, min(size, CHUNK_BYTES // max(1, row_bytes)))
        # Pieces of equal size are compressed without a copy.
        divisors = (number for number in range(limit, limit // 2, -1) if size % number == 0)
        chunk.append(next(divisors, limit))
    return chunk


def batches(leaves: Sequence[LazyArray]) -> Iterator[slice]:
    """Slices of at most CHUNK_BYTES together, or of one larger leaf.

    Each slice is committed at once: a commit of tiny leaves is mostly overhead.
    """
    start, size = 0, 0
    for i, leaf in enumerate(leaves):
        if i > start and size + leaf.nbytes > CHUNK_BYTES:
            yield slice(start, i)
            start, size = i, 0
        size += leaf.nbytes
    yield slice(start, len(leaves))


def as_lazy(leaf: LazyArray | np.ndarray | jax.Array) -> LazyArray | jax.Array:
    """An array that this process holds whole as a `LazyArray`, copied to the host when it is read.

    Arrays that are sharded over several processes stay what they are.
    """
    if isinstance(leaf, LazyArray):
        return leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    return LazyArray(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))

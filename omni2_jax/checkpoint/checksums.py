"""Checksums of stored arrays: a CRC-32C behind every chunk, which is checked when it is read.

tensorstore computes both (`crc32c`, a codec of Zarr 3). A process that restores a shard of an array
therefore checks the chunks of that shard, and reads nothing twice. The nodes of the B+tree in which
tensorstore finds the chunks (OCDBT) have checksums of their own.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

T = TypeVar("T")

# Zstandard's level 1 makes bfloat16 weights smaller by a fifth; higher levels hardly save more.
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
)


def zarr_metadata(
    global_shape: Sequence[int], chunk_shape: Sequence[int], use_compression: bool
) -> dict:
    """The Zarr 3 metadata of a new array. It replaces Orbax's, which has no checksum."""
    codecs = [codec for codec in CODECS if use_compression or codec["name"] != "zstd"]
    return {
        "shape": global_shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": codecs,
    }


# Orbax has no option for the codecs, and it writes sharded arrays in background threads, so the
# function that states the codecs is replaced in the whole process.
if not hasattr(tensorstore_utils, "_build_zarr3_metadata"):
    raise ImportError("this version of orbax-checkpoint has no place to add checksums to arrays")
tensorstore_utils._build_zarr3_metadata = zarr_metadata


async def wait_for_all_reads(reading: Awaitable[T]) -> T:
    """The result of an Orbax operation; its failure is raised when its other reads have ended.

    Orbax closes the event loop at the first damaged chunk. Each read that has not ended by then
    prints a traceback on stderr.
    """
    before = asyncio.all_tasks()
    try:
        return await reading
    except Exception:
        if pending := asyncio.all_tasks() - before:
            await asyncio.wait(pending)
        raise


class NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, with `wait_for_all_reads`."""

    async def metadata(self, infos):
        return await wait_for_all_reads(super().metadata(infos))

    async def deserialize(self, infos, args=None):
        return await wait_for_all_reads(super().deserialize(infos, args))


class ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of (sharded) JAX arrays, with `wait_for_all_reads`."""

    async def metadata(self, infos):
        return await wait_for_all_reads(super().metadata(infos))

    async def deserialize(self, infos, args=None):
        return await wait_for_all_reads(super().deserialize(infos, args))


def tree_handler(
    *handlers: tuple[type, ocp.type_handlers.TypeHandler],
) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees of arrays, which writes checksums.

    It also reads trees that were written without checksums. handlers: of further types of leaves.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        *handlers,
        (np.ndarray, NumpyHandler()),
        (jax.Array, ArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)


def has_checksums(array: ocp.metadata.ArrayMetadata) -> bool:
    """Whether an array has checksums. Version 0.1 wrote Zarr 2, without them."""
    zarr = array.storage and array.storage.zarr_metadata
    return zarr is not None and zarr.zarr_format == 3

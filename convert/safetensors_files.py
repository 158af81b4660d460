"""Lazy tensors of .safetensors files, and of the index files that lead to several of them.

The format: 8 bytes with the size of the header, the header (JSON: name -> dtype, shape, offsets),
the data.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.convert import json_files
from omni2_jax.convert.json_files import short
from omni2_jax.convert.plan import ConversionError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 100_000  # the largest release has 1,559
DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I64": np.int64,
}


def weights_file(directory: Path) -> Path:
    """Where a directory's tensors are: model.safetensors, or the index of its shards.

    Raises ConversionError if the directory has neither.
    """
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (directory / name).exists():
            return directory / name
    raise ConversionError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json"
    )


def tensors(path: Path) -> dict[str, LazyArray]:
    """Every tensor of a `weights_file`, by name.

    Raises ConversionError if the index or a file is damaged, if the index names a file outside its
    directory, or a tensor that the file does not hold.
    """
    if path.suffix == ".safetensors":
        return read(path)
    weight_map = json_files.read(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{path} has no weight_map, expected tensor names and their files")
    files = {
        tensor: json_files.inside(path.parent, file, f"{path}: the file of {short.repr(tensor)}")
        for tensor, file in weight_map.items()
    }
    shards = {file: read(file) for file in sorted(set(files.values()))}
    absent = [
        f"{short.repr(tensor)[1:-1]} (in {file.name})"
        for tensor, file in files.items()
        if tensor not in shards[file]
    ]
    if absent:
        raise ConversionError(
            f"{path} lists tensors that its shards do not hold: {', '.join(absent[:20])}"
        )
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def read(path: Path) -> dict[str, LazyArray]:
    """Every tensor of a .safetensors file, by name; each is read through its own memory map.

    Raises ConversionError if the file is missing, cut short or damaged, if its header is larger
    than MAX_HEADER_BYTES or has more than MAX_TENSORS entries, or if a type is not in DTYPES.
    """
    header_size, total = 0, 0
    try:
        with open(json_files.regular_file(path), "rb") as file:
            header_size, total = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if total < 8 or header_size > total - 8:
                raise ConversionError(
                    f"{path} is no safetensors file or is cut short: its header should be "
                    f"{header_size} bytes, the file is {total}"
                )
            if header_size > MAX_HEADER_BYTES:
                raise ConversionError(
                    f"{path}: its header has {header_size} bytes, "
                    f"expected {MAX_HEADER_BYTES} at most"
                )
            content = file.read(header_size)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from None
    # Counted before parsing, which takes about ten times the memory of the text.
    if (count := content.count(b'"data_offsets"')) > MAX_TENSORS:
        raise ConversionError(
            f"{path}: its header lists {count} tensors, expected {MAX_TENSORS} at most"
        )
    header = json_files.parse(content, f"the safetensors header of {path}")
    header.pop("__metadata__", None)
    return {
        name: locate(path, name, entry, 8 + header_size, total) for name, entry in header.items()
    }


def locate(path: Path, name: str, entry: Any, start: int, total: int) -> LazyArray:
    """The tensor that an entry of a header describes.

    start: where the data begins, in bytes. total: the file's size. Raises ConversionError if the
    entry is damaged or its data lies behind the end of the file.
    """
    if not well_formed(entry):
        raise ConversionError(
            f"{path} is corrupt, or its type is none of {', '.join(DTYPES)}: "
            f"it describes {short.repr(name)[1:-1]} as {short.repr(entry)}"
        )
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = np.dtype(DTYPES[entry["dtype"]])
    if start + end > total:
        raise ConversionError(
            f"{path} is cut short: {name} ends at byte {start + end}, the file has {total}"
        )
    return LazyArray(shape, dtype, memory_map(path, dtype, start + begin, shape))


def well_formed(entry: Any) -> bool:
    """Whether an entry of a header has a known type, a shape, and offsets that agree with both."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(DTYPES):
        return False
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        return False
    itemsize = np.dtype(DTYPES[entry["dtype"]]).itemsize
    return offsets[1] - offsets[0] == itemsize * math.prod(shape)


def is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of integers that are not negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def memory_map(
    path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    """A reader of one tensor at byte `offset`; the map is closed when the array is dropped."""

    def read_tensor() -> np.ndarray:
        if not shape:
            return np.fromfile(path, dtype, 1, offset=offset).reshape(())
        return np.memmap(path, dtype, "r", offset, shape)

    return read_tensor

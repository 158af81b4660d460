"""LazyArray tensors of the file formats that weights come in: safetensors, torch .pt, ONNX, and shape lists for dry runs."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from omni2_jax.convert.plan import ConversionError, Source

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I64": np.int64,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and dtype are known, `read` brings the numbers (None for a shape list)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray | None]


def abstract(keys: dict[str, tuple[list[int], str]]) -> dict[str, Source]:
    """Sources from a list of name -> (shape, dtype name), without numbers."""
    return {
        name: Tensor(tuple(shape), np.dtype(getattr(ml_dtypes, dtype, dtype)), lambda: None)
        for name, (shape, dtype) in keys.items()
    }


def safetensors(path: Path) -> dict[str, Source]:
    """Every tensor of a .safetensors file, read through a memory map."""
    try:
        with open(path, "rb") as file:
            size, total = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if size > total - 8:
                raise ConversionError(
                    f"{path} is no safetensors file or is cut short: its header should be {size} bytes, the file is {total}"
                )
            header = json.loads(file.read(size))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(header, dict):
        raise ConversionError(
            f"{path} is no safetensors file: its header is a {type(header).__name__}"
        )
    header.pop("__metadata__", None)
    return {name: located(path, name, entry, 8 + size, total) for name, entry in header.items()}


def located(path: Path, name: str, entry: dict, start: int, total: int) -> Source:
    """The tensor that an entry of a safetensors header describes; `start` is where the data begins, `total` the file's size."""
    try:
        shape, (begin, end), dtype = (
            tuple(entry["shape"]),
            entry["data_offsets"],
            np.dtype(DTYPES[entry["dtype"]]),
        )
        fits = begin >= 0 and end - begin == dtype.itemsize * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ConversionError(
            f"{path} is corrupt, or its type is none of {', '.join(DTYPES)}: it describes {name} as {entry}"
        )
    if start + end > total:
        raise ConversionError(
            f"{path} is cut short: {name} ends at byte {start + end}, the file has {total}"
        )
    return Tensor(shape, dtype, mapped(path, dtype, start + begin, shape))


def mapped(
    path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    """A reader of one tensor through its own memory map, which is unmapped when the array is dropped."""
    return lambda: (
        np.memmap(path, dtype, "r", offset, shape)
        if shape
        else np.fromfile(path, dtype, 1, offset=offset).reshape(())
    )


def torch_object(path: Path):
    """What a torch .pt file holds (weights only, memory mapped)."""
    import torch

    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch, pickle and zipfile raise a dozen kinds, all meaning: this is no weights file
        raise ConversionError(
            f"cannot read {path} as a torch weights file: {reason(error)}"
        ) from None


def torch_file(path: Path, *keys: str) -> dict[str, Source]:
    """Every tensor of a torch .pt file; `keys` lead to the state dict inside it."""
    state = torch_object(path)
    for key in keys:
        if not isinstance(state, dict) or key not in state:
            raise ConversionError(f"{path} has no {key!r}: it is another kind of torch file")
        state = state[key]
    if not isinstance(state, dict):
        raise ConversionError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    return {name: torch_tensor(value) for name, value in state.items() if hasattr(value, "dtype")}


def torch_dims(path: Path) -> dict[str, int]:
    """The `dims` of an OpenAI Whisper .pt file."""
    content = torch_object(path)
    if not isinstance(content, dict) or "dims" not in content:
        raise ConversionError(f"{path} is not an OpenAI Whisper file: it has no 'dims'")
    return content["dims"]


def reason(error: BaseException) -> str:
    """Why, without the file's name, which the message has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def torch_tensor(value) -> Source:
    """An unread view of a torch tensor; bfloat16 goes through its bit pattern, as numpy has no such type."""
    import torch

    name = str(value.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if value.dtype == torch.bfloat16:
        return Tensor(
            tuple(value.shape),
            dtype,
            lambda: value.contiguous().view(torch.int16).numpy().view(dtype),
        )
    return Tensor(tuple(value.shape), dtype, lambda: value.contiguous().numpy())


def onnx_file(path: Path) -> dict[str, Source]:
    """Every constant input of an ONNX graph's nodes, named by its use as "<node>.<operator>.<input>", in topological order.

    The names in the file are no guide: exporters number them, fold them and store some as nodes.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ConversionError(f"cannot read {path} as an ONNX model: {reason(error)}") from None
    constants, sources = {tensor.name: tensor for tensor in graph.initializer}, {}
    for position, node in enumerate(graph.node):
        if node.op_type == "Constant":
            constants.update(
                (node.output[0], attribute.t)
                for attribute in node.attribute
                if attribute.name == "value"
            )
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        else:
            uses = {
                f"{position}.{node.op_type}.{slot}": constants[name]
                for slot, name in enumerate(node.input)
                if name in constants
            }
            sources.update((use, onnx_tensor(tensor)) for use, tensor in uses.items())
    return sources


def onnx_tensor(tensor) -> Source:
    """An unread view of an ONNX tensor."""
    import onnx

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Tensor(tuple(tensor.dims), dtype, lambda: onnx.numpy_helper.to_array(tensor))

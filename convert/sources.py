"""Unread tensors of the file formats that weights come in: safetensors, torch .pt, ONNX, and shape lists for dry runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.engine import ConversionError, Source

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "I64": np.int64}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and dtype are known, `read` brings the numbers (None for a shape list)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray | None]


def abstract(keys: dict[str, tuple[list[int], str]]) -> dict[str, Source]:
    """Sources from a list of name -> (shape, dtype name), without numbers."""
    return {name: Tensor(tuple(shape), np.dtype(getattr(ml_dtypes, dtype, dtype)), lambda: None) for name, (shape, dtype) in keys.items()}


def safetensors(path: Path) -> dict[str, Source]:
    """Every tensor of a .safetensors file, read through a memory map."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if size > total - 8:
                raise ConversionError(f"{path} is not a safetensors file or is cut short: its header claims {size} bytes of {total}")
            header = json.loads(file.read(size))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {error}") from None
    header.pop("__metadata__", None)
    sources, start = {}, 8 + size
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ConversionError(f"{path}: {name} is of type {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        if start + end > total:
            raise ConversionError(f"{path} is cut short: {name} ends at byte {start + end}, the file has {total}")
        sources[name] = Tensor(tuple(entry["shape"]), np.dtype(dtype), mapped(path, np.dtype(dtype), start + begin, tuple(entry["shape"])))
    return sources


def mapped(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """A reader of one tensor through its own memory map, which is unmapped when the array is dropped."""
    return lambda: np.memmap(path, dtype, "r", offset, shape) if shape else np.fromfile(path, dtype, 1, offset=offset).reshape(())


def torch_object(path: Path):
    """What a torch .pt file holds (weights only, memory mapped)."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch, pickle and zipfile raise a dozen kinds, all meaning: this is no weights file
        raise ConversionError(f"cannot read {path} as a torch weights file: {first_line(error)}") from None


def torch_file(path: Path, *keys: str) -> dict[str, Source]:
    """Every tensor of a torch .pt file; `keys` lead to the state dict inside it."""
    state = torch_object(path)
    for key in keys:
        if not isinstance(state, dict) or key not in state:
            raise ConversionError(f"{path} has no {key!r}: it is another kind of torch file")
        state = state[key]
    return {name: torch_tensor(value) for name, value in state.items() if hasattr(value, "dtype")}


def torch_dims(path: Path) -> dict[str, int]:
    """The `dims` of an OpenAI Whisper .pt file."""
    content = torch_object(path)
    if not isinstance(content, dict) or "dims" not in content:
        raise ConversionError(f"{path} is not an OpenAI Whisper file: it has no 'dims'")
    return content["dims"]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def torch_tensor(value) -> Source:
    """An unread view of a torch tensor; bfloat16 goes through its bit pattern, as numpy has no such type."""
    import torch

    name = str(value.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if value.dtype == torch.bfloat16:
        return Tensor(tuple(value.shape), dtype, lambda: value.contiguous().view(torch.int16).numpy().view(dtype))
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
        raise ConversionError(f"cannot read {path} as an ONNX model: {error}") from None
    constants, sources = {tensor.name: tensor for tensor in graph.initializer}, {}
    for position, node in enumerate(graph.node):
        if node.op_type == "Constant":
            constants.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        else:
            uses = {f"{position}.{node.op_type}.{slot}": constants[name] for slot, name in enumerate(node.input) if name in constants}
            sources.update((use, onnx_tensor(tensor)) for use, tensor in uses.items())
    return sources


def onnx_tensor(tensor) -> Source:
    """An unread view of an ONNX tensor."""
    import onnx

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Tensor(tuple(tensor.dims), dtype, lambda: onnx.numpy_helper.to_array(tensor))

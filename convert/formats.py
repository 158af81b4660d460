"""Lazy tensors of torch .pt files, of ONNX files, and of shape lists for dry runs."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.convert.json_files import regular_file
from omni2_jax.convert.plan import ConversionError


def abstract(keys: Mapping[str, tuple[list[int], str]]) -> dict[str, LazyArray]:
    """Sources from a list of name -> (shape, dtype name); their `read` returns None."""

    def no_numbers() -> Any:
        return None

    return {
        name: LazyArray(tuple(shape), np.dtype(getattr(ml_dtypes, dtype, dtype)), no_numbers)
        for name, (shape, dtype) in keys.items()
    }


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, without its name, which the message has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- torch ----


def torch_object(path: Path) -> Any:
    """The content of a torch .pt file, memory mapped. No code in it is run (weights only).

    Raises ConversionError if the file is missing, damaged, or holds more than weights.
    """
    import torch

    regular_file(path)
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch, pickle and zipfile raise a dozen kinds
        raise ConversionError(
            f"cannot read {path} as a torch weights file: {reason(error)}"
        ) from None


def torch_file(path: Path, *keys: str) -> dict[str, LazyArray]:
    """Every tensor of a torch .pt file, by name; `keys` lead to the state dict inside it.

    Raises ConversionError if the file cannot be read or has no such state dict.
    """
    state = torch_object(path)
    for key in keys:
        if not isinstance(state, dict) or key not in state:
            raise ConversionError(f"{path} has no {key!r}: it is another kind of torch file")
        state = state[key]
    if not isinstance(state, dict):
        raise ConversionError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    if strange := [name for name in state if not isinstance(name, str)]:
        raise ConversionError(f"{path} holds {strange[0]!r} as a name, expected a text")
    return {
        name: torch_tensor(value, f"{path}: {name}")
        for name, value in state.items()
        if hasattr(value, "dtype")
    }


def torch_dims(path: Path) -> dict[str, Any]:
    """The `dims` of an OpenAI Whisper .pt file. Raises ConversionError if it has none."""
    content = torch_object(path)
    if not isinstance(content, dict) or not isinstance(content.get("dims"), dict):
        raise ConversionError(f"{path} is not an OpenAI Whisper file: it has no 'dims'")
    return content["dims"]


def torch_tensor(value: Any, context: str) -> LazyArray:
    """A lazy view of a torch tensor; bfloat16 goes through its bits, as numpy has no such type.

    Raises ConversionError, which starts with `context`, if numpy has nothing like the tensor.
    """
    import torch

    name = str(value.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ConversionError(f"{context} has type {name}, expected numbers") from None
    if value.layout != torch.strided:
        raise ConversionError(f"{context} is a {value.layout} tensor, expected a dense one")

    def read() -> np.ndarray:
        dense = value.contiguous()
        if value.dtype == torch.bfloat16:
            return dense.view(torch.int16).numpy().view(dtype)
        return dense.numpy()

    return LazyArray(tuple(value.shape), dtype, read)


# ---- ONNX ----


def onnx_file(path: Path) -> dict[str, LazyArray]:
    """Every constant input of an ONNX graph's nodes, in topological order.

    They are named by their use as "<node>.<operator>.<input>"; the names in the file are no guide,
    as exporters number them, fold them and store some as nodes.
    Raises ConversionError if the file cannot be read or its graph is damaged.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(regular_file(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ConversionError(f"cannot read {path} as an ONNX model: {reason(error)}") from None
    try:
        return {use: onnx_tensor(tensor, path) for use, tensor in constant_inputs(graph)}
    except (IndexError, KeyError, TypeError) as error:
        raise ConversionError(f"the graph in {path} is damaged: {error!r}") from None


def constant_inputs(graph: Any) -> Iterator[tuple[str, Any]]:
    """Use and tensor (protobuf) of every constant input of a graph's nodes."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for position, node in enumerate(graph.node):
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        else:
            for place, name in enumerate(node.input):
                if name in constants:
                    yield f"{position}.{node.op_type}.{place}", constants[name]


def onnx_tensor(tensor: Any, path: Path) -> LazyArray:
    """A lazy view of an ONNX tensor. Raises ConversionError if its data is not in the file."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ConversionError(f"{path} keeps {tensor.name!r} in another file, expected all in one")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))

    def read() -> np.ndarray:
        try:
            return onnx.numpy_helper.to_array(tensor)
        except ValueError as error:
            raise ConversionError(f"{path}: {tensor.name!r} is damaged: {error}") from None

    return LazyArray(tuple(tensor.dims), dtype, read)

"""Lazy tensors of a CTranslate2 Whisper directory, such as those of faster-whisper.

model.bin is a header and the variables one after the other, all numbers little-endian:

    uint32 version, text model, uint32 revision, uint32 number of variables
    for each: text name, uint8 rank, uint32[rank] shape, uint8 type, uint32 bytes, the data

where a text is a uint16 length with its closing zero. Weights of type int8 have a variable
NAME_scale: row r of the weight is its integers divided by scale[r].
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import SpeechEncoderConfig
from omni2_jax.convert.json_files import checked, regular_file
from omni2_jax.convert.plan import ConversionError

FILE, MODEL, VERSION = "model.bin", "WhisperSpec", 6
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: ml_dtypes.bfloat16}
MAX_VARIABLES, MAX_NAME, MAX_RANK = 100_000, 1000, 8

ENCODER = {  # OpenAI's names -> CTranslate2's, both without ".weight" and ".bias"
    "conv1": "conv1",
    "conv2": "conv2",
    "ln_post": "layer_norm",
}
BLOCK = {
    "attn.out": "self_attention/linear_1",
    "attn_ln": "self_attention/layer_norm",
    "mlp.0": "ffn/linear_0",
    "mlp.2": "ffn/linear_1",
    "mlp_ln": "ffn/layer_norm",
}
JOINED = "self_attention/linear_0"  # queries, keys and values, one below the other
NORM = "layer_norm"  # its weight is called gamma, its bias beta


@dataclass(frozen=True)
class Variable:
    """Where a variable lies in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def read(self, path: Path) -> np.ndarray:
        """Its values, as they are stored."""
        return np.memmap(path, self.dtype, "r", self.offset, self.shape or (1,))


def is_directory(path: Path) -> bool:
    """Whether a directory is CTranslate2's: others have no model.bin."""
    return (path / FILE).is_file()


def whisper(directory: Path) -> tuple[SpeechEncoderConfig, dict[str, LazyArray]]:
    """The encoder of a Whisper: its dimensions, and tensors in OpenAI's names after "encoder.".

    Raises ConversionError if the file is another model's, damaged, or of a type that is not read.
    """
    path = regular_file(directory / FILE)
    variables = {
        name.removeprefix("encoder/"): variable
        for name, variable in read_header(path).items()
        if name.startswith("encoder/")
    }
    try:
        mels, width = variables["conv1/weight"].shape[1], variables["conv1/weight"].shape[0]
        frames = variables["position_encodings/encodings"].shape[0]
        heads = int(variables["num_heads"].read(path)[0])
    except (KeyError, IndexError) as error:
        raise ConversionError(f"{path} has no speech encoder: {error} is missing") from None
    layers = sum(name.endswith(f"{JOINED}/weight") for name in variables)
    fields = {"mels": mels, "frames": frames, "width": width, "layers": layers, "heads": heads}
    config = checked(SpeechEncoderConfig, f"{path}: the speech encoder", fields)
    tensors = {"positional_embedding": tensor(path, variables, "position_encodings/encodings")}
    for ours, theirs in ENCODER.items():
        tensors |= layer(path, variables, ours, theirs)
    for i in range(layers):
        for ours, theirs in BLOCK.items():
            tensors |= layer(path, variables, f"blocks.{i}.{ours}", f"layer_{i}/{theirs}")
        tensors |= attention(path, variables, f"blocks.{i}.attn", f"layer_{i}/{JOINED}", width)
    return config, {f"encoder.{name}": leaf for name, leaf in tensors.items()}


def layer(
    path: Path, variables: dict[str, Variable], ours: str, theirs: str
) -> dict[str, LazyArray]:
    """Weight and bias of a layer."""
    weight, bias = ("gamma", "beta") if theirs.endswith(NORM) else ("weight", "bias")
    return {
        f"{ours}.weight": tensor(path, variables, f"{theirs}/{weight}"),
        f"{ours}.bias": tensor(path, variables, f"{theirs}/{bias}"),
    }


def attention(
    path: Path, variables: dict[str, Variable], ours: str, theirs: str, width: int
) -> dict[str, LazyArray]:
    """Queries, keys and values of a block; Whisper's keys have no bias, hence zeros in the file."""
    weight = tensor(path, variables, f"{theirs}/weight", rows=3 * width)
    bias = tensor(path, variables, f"{theirs}/bias", rows=3 * width)

    def part(index: int, of: LazyArray) -> LazyArray:
        def read() -> np.ndarray:
            return of.read()[index * width : (index + 1) * width]

        return LazyArray((width, *of.shape[1:]), of.dtype, read)

    parts = {name: index for index, name in enumerate(("query", "key", "value"))}
    tensors = {f"{ours}.{name}.weight": part(index, weight) for name, index in parts.items()}
    return tensors | {
        f"{ours}.{name}.bias": part(index, bias) for name, index in parts.items() if name != "key"
    }


def tensor(
    path: Path, variables: dict[str, Variable], name: str, rows: int | None = None
) -> LazyArray:
    """A variable as floating-point numbers. rows: how many it must have.

    Raises ConversionError if it is missing, of another size, or of a type that is not read.
    """
    context = f"{path}: encoder/{name}"
    if name not in variables:
        raise ConversionError(f"{context} is missing")
    variable, scale = variables[name], variables.get(f"{name}_scale")
    if rows is not None and variable.shape[:1] != (rows,):
        raise ConversionError(f"{context} has shape {list(variable.shape)}, expected {rows} rows")
    if variable.dtype.kind == "f" or variable.dtype == ml_dtypes.bfloat16:
        return LazyArray(variable.shape, variable.dtype, lambda: variable.read(path))
    if variable.dtype != np.int8 or scale is None or scale.shape != variable.shape[:1]:
        raise ConversionError(
            f"{context} has type {variable.dtype}, expected floating-point numbers, or int8 with "
            "one scale for each row"
        )

    def read() -> np.ndarray:
        scales = np.asarray(scale.read(path), np.float32)
        return variable.read(path) / scales.reshape(-1, *[1] * (len(variable.shape) - 1))

    return LazyArray(variable.shape, np.dtype(np.float32), read)


def read_header(path: Path) -> dict[str, Variable]:
    """Every variable of a model.bin by name; aliases, at the end of the file, are not read.

    Raises ConversionError if the file is another model's, of another version, or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (version,) = unpack(file, "I")
            if version != VERSION:
                raise ConversionError(
                    f"{path} is no CTranslate2 model of version {VERSION}: it begins with {version}"
                )
            if (model := text(file)) != MODEL:
                raise ConversionError(f"{path} is a {model}, expected {MODEL}")
            _, count = unpack(file, "II")
            if count > MAX_VARIABLES:
                raise ValueError(f"{count} variables")
            return dict(variables_of(file, count, size))
    except (ValueError, OSError, struct.error, KeyError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path} is damaged: {error}") from None


def variables_of(file: BinaryIO, count: int, size: int) -> Iterator[tuple[str, Variable]]:
    """The next `count` variables of a file of `size` bytes. Raises ValueError for a false one."""
    for _ in range(count):
        name = text(file)
        (rank,) = unpack(file, "B")
        if rank > MAX_RANK:
            raise ValueError(f"{name} has {rank} axes")
        shape = unpack(file, f"{rank}I")
        kind, nbytes = unpack(file, "BI")
        dtype = np.dtype(TYPES[kind]) if kind in TYPES else None
        variable_size = dtype.itemsize * int(np.prod(shape, dtype=object)) if dtype else -1
        offset = file.tell()
        if dtype is None or nbytes != variable_size or offset + nbytes > size:
            raise ValueError(f"{name} of type {kind} and shape {list(shape)} has {nbytes} bytes")
        file.seek(nbytes, 1)
        yield name, Variable(shape, dtype, offset)


def unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    """The next numbers of a file. Raises struct.error at its end."""
    layout = "<" + layout
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def text(file: BinaryIO) -> str:
    """The next text of a file. Raises ValueError if it is none."""
    (length,) = unpack(file, "H")
    if length > MAX_NAME:
        raise ValueError(f"a name of {length} bytes")
    return file.read(length).rstrip(b"\0").decode()

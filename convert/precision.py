"""The form in which a checkpoint stores its parameters: floating numbers, or int8 with scales.

Each output of a matrix has a scale of its own: its largest weight is 127 of them (row by row for a
table). A scale is a bfloat16 number, so that none changes where a model computes in bfloat16.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten, unflatten
from omni2_jax.config import Omni2Config
from omni2_jax.convert.release import Release
from omni2_jax.models.model import abstract_state

StoredType = Literal["float32", "bfloat16"]
QUANTIZED = ("speech_encoder", "llm", "speech_lm")  # the parts that have most of the weights
LARGEST = 127
SCALE = "_scale"  # the scales of matrix "kernel" are "kernel_scale"


def stored_as(release: Release, dtype: StoredType) -> Release:
    """The release with all floating parameters in `dtype`. Integers stay what they are."""
    params = jax.tree.map(partial(cast, dtype=np.dtype(jnp.dtype(dtype))), release.params)
    return dataclasses.replace(release, params=params)


def cast(leaf: LazyArray, dtype: np.dtype) -> LazyArray:
    """A floating parameter in another type, converted when it is read."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == dtype:
        return leaf
    return LazyArray(leaf.shape, dtype, lambda: leaf.read().astype(dtype))


def quantized_parts(config: Omni2Config) -> list[str]:
    """The parts whose matrices are int8."""
    parts = {part: getattr(config, part) for part in QUANTIZED}
    return [part for part, settings in parts.items() if settings and settings.weights == "int8"]


def with_int8(config: Omni2Config, parts: Sequence[str]) -> Omni2Config:
    """The dimensions of a checkpoint in which the matrices of these parts are int8."""
    return with_weights(config, parts, "int8")


def with_weights(
    config: Omni2Config, parts: Sequence[str], weights: Literal["int8", "float"]
) -> Omni2Config:
    """The dimensions of a checkpoint in which the matrices of these parts are stored so."""
    changed = {part: dataclasses.replace(getattr(config, part), weights=weights) for part in parts}
    return config.replace(**changed)


def quantized(release: Release) -> Release:
    """The release with the matrices of both language models and of the speech encoder as int8.

    Raises ValueError if it has none of these parts, or if one of them is int8 already.
    """
    if parts := quantized_parts(release.config):
        raise ValueError(f"{', '.join(parts)} is int8 already; quantize the checkpoint it is from")
    parts = [part for part in QUANTIZED if part in release.params]
    if not parts:
        raise ValueError(f"nothing to quantize: expected {', '.join(QUANTIZED)}")
    config = with_int8(release.config, parts)
    state = abstract_state(config)[1]
    new = {part: quantized_part(release.params[part], state[part]) for part in parts}
    return dataclasses.replace(release, config=config, params=release.params | new)


def dequantized(release: Release) -> Release:
    """The release with its int8 matrices as float32: each integer times the scale of its output.

    It can be trained further. Raises ValueError if nothing is int8.
    """
    parts = quantized_parts(release.config)
    if not parts:
        raise ValueError("nothing to dequantize: no part has int8 weights")
    config = with_weights(release.config, parts, "float")
    before, after = abstract_state(release.config)[1], abstract_state(config)[1]
    new = {
        part: dequantized_part(release.params[part], before[part], after[part]) for part in parts
    }
    return dataclasses.replace(release, config=config, params=release.params | new)


@dataclass(frozen=True)
class Matrix:
    """Where a matrix, or stacked layers of it, has its outputs.

    axes: of one layer. reduced: those of them over which an output is a sum.
    """

    path: str
    axes: int
    reduced: tuple[int, ...]
    scale_shape: tuple[int, ...]  # of the stored scales, with the axis of stacked layers


def matrices(state: Any) -> Iterator[Matrix]:
    """The matrices of a part that are int8, from the module's abstract `state`."""
    variables = {
        jax.tree_util.keystr(path, simple=True, separator="."): variable
        for path, variable in jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )[0]
    }
    for path, variable in variables.items():
        if not path.endswith(SCALE):
            continue
        matrix = path.removesuffix(SCALE)
        axes = len(variables[matrix].get_metadata()["axes"])
        outputs = len(variable.get_metadata()["axes"])
        is_table = matrix.endswith("table")  # whose rows are the outputs
        reduced = tuple(range(1, axes) if is_table else range(axes - outputs))
        yield Matrix(matrix, axes, reduced, variable.get_value().shape)


def quantized_part(params: Any, state: Any) -> dict:
    """A part's parameters as int8 and scales. state: of the module that has scales, abstract."""
    leaves = dict(flatten(params))
    for matrix in matrices(state):
        weights = leaves[matrix.path]
        leaves[matrix.path + SCALE] = LazyArray(
            matrix.scale_shape, np.dtype(ml_dtypes.bfloat16), partial(scales, weights, matrix)
        )
        leaves[matrix.path] = LazyArray(
            weights.shape, np.dtype(np.int8), partial(integers, weights, matrix)
        )
    return unflatten(nnx.to_pure_dict(state), leaves)


def dequantized_part(params: Any, state: Any, float_state: Any) -> dict:
    """A part's parameters without scales. The states: of the modules with and without, abstract."""
    leaves = dict(flatten(params))
    for matrix in matrices(state):
        weights, factors = leaves[matrix.path], leaves.pop(matrix.path + SCALE)
        leaves[matrix.path] = LazyArray(
            weights.shape, np.dtype(np.float32), partial(products, weights, factors, matrix)
        )
    return unflatten(nnx.to_pure_dict(float_state), leaves)


def products(weights: LazyArray, factors: LazyArray, matrix: Matrix) -> np.ndarray:
    """The integers times the scales of their outputs, float32."""
    values = weights.read()
    stacked = values.ndim - matrix.axes
    reduced = tuple(stacked + axis for axis in matrix.reduced)
    return values * np.expand_dims(factors.read().astype(np.float32), reduced)


def scales(weights: LazyArray, matrix: Matrix) -> np.ndarray:
    """The scales of a matrix or of stacked layers of it, bfloat16."""
    values = weights.read()
    is_stacked = values.ndim > matrix.axes
    layers = values if is_stacked else values[None]
    found = np.stack([scale(layer, matrix.reduced) for layer in layers])
    return found if is_stacked else found[0]


def integers(weights: LazyArray, matrix: Matrix) -> np.ndarray:
    """The matrix in multiples of its scales, int8. Only one layer is in memory as float32."""
    values = weights.read()
    result = np.empty(values.shape, np.int8)
    is_stacked = values.ndim > matrix.axes
    layers, results = (values, result) if is_stacked else (values[None], result[None])
    for layer, target in zip(layers, results, strict=True):
        step = np.expand_dims(scale(layer, matrix.reduced).astype(np.float32), matrix.reduced)
        rounded = np.rint(layer.astype(np.float32) / step)
        target[...] = np.clip(rounded, -LARGEST, LARGEST)
    return result


def scale(matrix: np.ndarray, reduced: tuple[int, ...]) -> np.ndarray:
    """The scale of each output, bfloat16; 1 for an output without weights."""
    largest = np.abs(matrix.astype(np.float32)).max(axis=reduced)
    return np.where(largest > 0, largest / LARGEST, 1).astype(ml_dtypes.bfloat16)

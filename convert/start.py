"""New parameters that training starts from: an adapter, a gate fusion, rows of the speech LM, and
whole parts of any dimensions.

V vocabulary, D width.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import PARTS, Omni2Config
from omni2_jax.models.adapter import Adapter
from omni2_jax.models.fusion import GateFusion
from omni2_jax.models.layers import initial_values
from omni2_jax.models.model import ConstantKey

SEED = 0
BLOCK = 4096  # rows that are held in memory beside a table


def adapter(config: Omni2Config) -> dict:
    """Lazy parameters of a new adapter between speech encoder and LLM."""
    encoder, llm, adapter = config.speech_encoder, config.llm, config.adapter
    assert encoder and llm and adapter

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return Adapter(adapter, encoder.width, llm.width, rngs)

    return initialised("adapter", build)


def fusion(config: Omni2Config) -> dict:
    """Lazy parameters of a new gate fusion between LLM and speech LM."""
    llm, speech_lm = config.llm, config.speech_lm
    assert llm and speech_lm

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return GateFusion(llm.width, speech_lm.width, config.mix, rngs)

    return initialised("fusion", build)


def initialised(part: str, build: Callable[[nnx.Rngs], nnx.Module]) -> dict:
    """A module's initial parameters as `LazyArray` leaves.

    Each is drawn alone when it is read: jit computes nothing that it does not return.
    """

    def params() -> dict:
        key = jax.random.fold_in(jax.random.key(SEED), PARTS.index(part))
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> LazyArray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")

        def draw() -> Any:
            return flatten(params())[name]

        def read() -> np.ndarray:
            return np.asarray(jax.jit(draw)())

        return LazyArray(shape.shape, np.dtype(shape.dtype), read)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(params))


def fresh(part: str, build: Callable[[Any], nnx.Module], seed: int) -> dict:
    """Lazy parameters of a whole part, as its modules say where training starts (`layers.param`).

    build: the part, from random keys. Only shapes are taken from it: NumPy draws each parameter
    when it is read, from a generator of its own, as JAX would first compile a program for each
    shape, minutes for the flow. A parameter depends on `seed` and its name alone.
    """
    state = nnx.state(nnx.eval_shape(lambda: build(ConstantKey(jax.random.key(0)))))

    def leaf(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        shape, metadata = variable.get_value().shape, variable.get_metadata()
        name = f"{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        read = functools.partial(values, name, shape, metadata, seed)
        return variable.replace(LazyArray(shape, np.dtype(np.float32), read))

    return nnx.to_pure_dict(
        jax.tree_util.tree_map_with_path(
            leaf, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    )


def values(name: str, shape: tuple[int, ...], metadata: dict, seed: int) -> np.ndarray:
    """The initial values of the parameter called `name`: constants, or normally distributed."""
    if "initial" in metadata:
        return initial_values(metadata["initial"], shape)
    random = np.random.default_rng((seed, zlib.crc32(name.encode())))
    array = random.standard_normal(shape, np.float32)
    array *= metadata["deviation"]
    return array


def extended(table: LazyArray, kept: int, vocabulary: int) -> LazyArray:
    """An embedding table [V, D] whose first `kept` rows stay and new ones follow.

    The result has `vocabulary` rows in all. New rows are drawn from a normal distribution with the
    mean and the deviation that each column has over the kept ones.
    """
    shape = (vocabulary, table.shape[1])

    def read() -> np.ndarray:
        rows = np.require(table.read(), requirements=["OWNDATA", "WRITEABLE"])
        rows.resize(shape, refcheck=False)  # in place, so that there is never a second table
        mean, deviation = column_statistics(rows[:kept])
        random = np.random.default_rng(SEED)
        for block in blocks_of(rows[kept:]):
            block[...] = mean + deviation * random.standard_normal(block.shape, np.float32)
        return rows

    return LazyArray(shape, table.dtype, read)


def column_statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [D] of every column of rows [V, D]."""
    total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for block in blocks_of(rows):
        total += block.sum(0, dtype=np.float64)
    mean = total / len(rows)
    for block in blocks_of(rows):
        squares += np.square(block - mean).sum(0)
    return mean.astype(np.float32), np.sqrt(squares / len(rows)).astype(np.float32)


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Views of BLOCK rows, in order; the last may have fewer."""
    for first in range(0, len(rows), BLOCK):
        yield rows[first : first + BLOCK]

"""What no release has is made here, so that training has a start: an adapter, a gate fusion, and the speech LM's rows for <sep> and units.

V vocabulary, D width.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import PARTS, Omni2Config
from omni2_jax.models.adapter import Adapter
from omni2_jax.models.fusion import GateFusion

SEED = 0
BLOCK = 4096  # rows in memory at once beside a table


def adapter(config: Omni2Config) -> dict:
    """Parameters of a new adapter between speech encoder and LLM, none drawn yet."""
    return initialised(
        "adapter",
        lambda rngs: Adapter(config.adapter, config.speech_encoder.width, config.llm.width, rngs),
    )


def fusion(config: Omni2Config) -> dict:
    """Parameters of a new gate fusion between LLM and speech LM, none drawn yet."""
    return initialised(
        "fusion",
        lambda rngs: GateFusion(config.llm.width, config.speech_lm.width, config.mix, rngs),
    )


def initialised(part: str, build: Callable[[nnx.Rngs], nnx.Module]) -> dict:
    """A module's initial parameters as `LazyArray` leaves; each is drawn alone when it is read, as jit leaves out what it does not return."""

    def params() -> dict:
        key = jax.random.fold_in(jax.random.key(SEED), PARTS.index(part))
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> LazyArray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return LazyArray(
            shape.shape,
            np.dtype(shape.dtype),
            lambda: np.asarray(jax.jit(lambda: flatten(params())[name])()),
        )

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(params))


def extended(table: LazyArray, kept: int, vocabulary: int) -> LazyArray:
    """An embedding table [V, D] of which the first `kept` rows stay and new ones follow, `vocabulary` in all.

    New rows are drawn from a normal with the mean and deviation that each column has over the kept ones.
    """
    shape = (vocabulary, table.shape[1])

    def read() -> np.ndarray:
        rows = table.read()
        rows.resize(shape, refcheck=False)  # in place, so that there is never a second table
        mean, deviation = statistics(rows[:kept])
        random = np.random.default_rng(SEED)
        for block in blocks(rows[kept:]):
            block[...] = mean + deviation * random.standard_normal(block.shape, np.float32)
        return rows

    return LazyArray(shape, table.dtype, read)


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [D] of every column of rows [V, D]."""
    mean = sum(block.sum(0, dtype=np.float64) for block in blocks(rows)) / len(rows)
    variance = sum(np.square(block - mean).sum(0) for block in blocks(rows)) / len(rows)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), BLOCK):
        yield rows[first : first + BLOCK]

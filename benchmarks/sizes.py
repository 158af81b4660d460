"""Models to measure: dimensions by name, with random weights when there is no checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding

from omni2_jax.checkpoint import parameters
from omni2_jax.config import (
    DecoderConfig,
    FlowConfig,
    HiftConfig,
    Omni2Config,
    SpeakerConfig,
    SpeechEncoderConfig,
    TokenConfig,
)
from omni2_jax.configs import omni2_0_5b, omni2_1_5b, omni2_3b, omni2_7b, omni2_14b, omni2_32b
from omni2_jax.convert.precision import LARGEST, QUANTIZED, with_int8
from omni2_jax.models.forms import for_serving
from omni2_jax.models.model import abstract_model, part_dtype
from omni2_jax.train.stages.base import Stage
from omni2_jax.train.weights import Params, Weights, split_params, stage_weights

TINY = Omni2Config(
    llm=DecoderConfig(vocabulary=512, width=64, layers=2, heads=4, kv_heads=2, hidden=128),
    speech_encoder=SpeechEncoderConfig(width=64, layers=2, heads=4),
    speech_lm=DecoderConfig(vocabulary=7168, width=64, layers=2, heads=4, kv_heads=2, hidden=128),
    flow=FlowConfig(
        width=64,
        heads=4,
        hidden=128,
        layers=2,
        channels=48,
        estimator_heads=4,
        estimator_head_size=16,
        blocks=1,
        mid_blocks=2,
    ),
    vocoder=HiftConfig(channels=64, f0_channels=32),
    speaker=SpeakerConfig(head_channels=4, channels=16, growth=8, layers=(2, 2, 2)),
    tokens=TokenConfig(speech=500, sep=500, unit_eos=499, text_eos=(498,)),
)
SIZES = {
    "tiny": TINY,
    "0.5b": omni2_0_5b.config,
    "1.5b": omni2_1_5b.config,
    "3b": omni2_3b.config,
    "7b": omni2_7b.config,
    "14b": omni2_14b.config,
    "32b": omni2_32b.config,
}


def of(size: str) -> Omni2Config:
    """The dimensions of a size. Raises ValueError if there is no such size."""
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; it is one of {', '.join(SIZES)}")
    return SIZES[size]


def load(
    size: str, directory: Path | None, dtype: jnp.dtype, int8: bool = False
) -> tuple[Omni2Config, nnx.GraphDef, dict]:
    """A model to generate with: a checkpoint, or a size with random weights.

    dtype: of the language side; the decoder is float32. int8: random matrices are those of a
    checkpoint that `omni2 convert --quantize int8` writes. Raises ValueError for an unknown size,
    for int8 with a checkpoint, and what `parameters.load` raises.
    """
    if directory is not None:
        if int8:
            raise ValueError(f"--int8 is for random weights; {directory} has its own")
        config = Omni2Config.load(directory / "config.json").replace(speaker=None)
        return config, *for_serving(*parameters.load(directory, config, dtype), donate=True)
    config = of(size).replace(speaker=None)
    if int8:
        config = with_int8(config, QUANTIZED)
    graph, shapes = abstract_model(config)
    leaves = {
        path: leaf if leaf.dtype == jnp.int8 else leaf.update(dtype=dtype_of(path, dtype))
        for path, leaf in parameters.flatten(shapes).items()
    }
    params = parameters.unflatten(shapes, random(leaves))
    return config, *for_serving(graph, params, donate=True)


def for_training(stage: Stage, config: Omni2Config, mesh: Mesh) -> tuple[Weights, Params, Params]:
    """Random weights of a stage; what `train.weights.load` returns for a checkpoint."""
    weights = stage_weights(stage, config, mesh)
    values = random(training_shapes(stage, weights), weights.shardings)
    return weights, *split_params(stage, values)


def training_shapes(stage: Stage, weights: Weights) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a stage's parameters in the dtypes of training: trained ones are float32."""
    dtype = jnp.dtype(stage.train.dtype)
    return {
        path: leaf.update(dtype=jnp.float32 if stage.is_trained(path) else dtype_of(path, dtype))
        for path, leaf in weights.shapes.items()
    }


def dtype_of(path: str, dtype: jnp.dtype) -> jnp.dtype:
    """`part_dtype` of the part that a parameter belongs to."""
    return part_dtype(path.partition(".")[0], dtype)


def random(
    shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Sharding] | None = None
) -> Params:
    """Small uniform numbers of these shapes; integers from -127 to 127, with scales to match.

    The generator is "rbg": it draws two billion numbers in seconds on a CPU, the default generator
    takes minutes.
    """

    def draw(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        return {
            path: draw_one(k, path, leaf)
            for k, (path, leaf) in zip(keys, shapes.items(), strict=True)
        }

    def draw_one(key: jax.Array, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jax.random.randint(key, leaf.shape, -LARGEST, LARGEST + 1, jnp.int8)
        largest = 0.03 / LARGEST if path.endswith("_scale") else 0.03
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -largest, largest)

    return jax.jit(draw, out_shardings=shardings and dict(shardings))(
        jax.random.key(0, impl="unsafe_rbg")
    )

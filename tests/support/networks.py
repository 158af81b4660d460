"""Tiny networks with released layouts: the flow, the vocoder and the speech tokenizer."""

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.config import FlowConfig, HiftConfig, SpeechTokenizerConfig
from omni2_jax.convert import formats, start
from omni2_jax.convert.plan import plan
from omni2_jax.convert.tables import flow as flow_table
from omni2_jax.convert.tables import hift as hift_table
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.models.flow.matching import Flow
from omni2_jax.models.vocoder.hift import Hift
from tests.support.paths import DECODER, GOLDENS

TINY_FLOW = FlowConfig(
    width=64,
    heads=4,
    hidden=128,
    layers=2,
    channels=48,
    estimator_heads=4,
    estimator_head_size=16,
    blocks=1,
    mid_blocks=2,
    noise_frames=600,
)
TINY_HIFT = HiftConfig(channels=64, f0_channels=32)
TINY_TOKENIZER = SpeechTokenizerConfig(width=128, layers=2, heads=2)

# The seed of the speech tokenizer's weights, chosen so that no value lies close to a rounding edge.
TOKENIZER_SEED = 466
TOKENIZER_CLIPS = ("speech_a", "synth_c")  # recordings with golden units: 67 and 63


def abstract_model(kind: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, dict]:
    """The graph of `kind(config, rngs)` and its parameters as shapes, without computing any."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def fresh_model(build: Callable[[Any], nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """The graph of `build(rngs)` and parameters as training starts from them.

    NumPy draws them, as for `omni2 new`: JAX would compile a program for each shape.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    params = start.fresh("part", build, seed)
    return graph, jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), params)


def compiled(model: Omni2, function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(parts, *arrays)` of the model's parts, as one program.

    Outside of `jax.jit` each operation is a program of its own.
    """
    run = jax.jit(lambda params, *arrays: function(nnx.merge(model.graph, params), *arrays))
    return run(model.params, *arrays)


def decoder_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file of the speech decoder."""
    return dict(np.load(DECODER / f"{name}.npz"))


# ---- flow ----


@functools.cache
def tiny_flow() -> Flow:
    """The tiny release, with the noise that its goldens were made with."""
    pytest.importorskip("torch")
    path = DECODER / "flow.pt"
    graph, shapes = abstract_model(Flow, TINY_FLOW)
    params = plan(flow_table.table(), formats.torch_file(path), shapes, path.name)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), params)
    noise = jnp.asarray(decoder_golden("rand_noise")["rand_noise"][0].T)
    return nnx.merge(graph, params | {"noise": noise})


@functools.cache
def full_pass() -> Callable[..., Any]:
    """Jitted `Flow.__call__` of the tiny flow: (units, lengths, voice, final, prompt, chunks)."""
    graph, params = nnx.split(tiny_flow())
    run = jax.jit(
        lambda params, *inputs: nnx.merge(graph, params)(*inputs),
        static_argnums=6,
    )
    return functools.partial(run, params)


# ---- vocoder ----


def hift_params(source: dict[str, Any] | None = None) -> dict:
    """The parameters of the tiny vocoder, from `source` {torch name: tensor} or the golden file."""
    pytest.importorskip("torch")
    if source is None:
        source = hift_table.plain_names(formats.torch_file(DECODER / "hift.pt"))
    shapes = abstract_model(Hift, TINY_HIFT)[1]
    leaves = plan(hift_table.table(TINY_HIFT), source, shapes, "hift.pt")
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf.read()), leaves, is_leaf=lambda leaf: hasattr(leaf, "read")
    )


def tiny_hift(params: dict) -> Hift:
    return nnx.merge(abstract_model(Hift, TINY_HIFT)[0], params)


def stored_draws() -> tuple[jax.Array, jax.Array]:
    """The phase [1, H] and noise [1, T, H] that stand for the reference's random draws."""
    stored = decoder_golden("hift_noise")
    return jnp.asarray(stored["phase_vec"][..., 0]), jnp.asarray(
        stored["noise_f16"].transpose(0, 2, 1), jnp.float32
    )


# ---- speech tokenizer ----


@functools.cache
def tokenizer_manifest() -> dict[str, list]:
    """{tensor name: [shape, dtype]} of the released speech tokenizer."""
    path = GOLDENS / "manifests" / "speech_tokenizer_v2.json"
    return json.loads(path.read_text())["keys"]


def draw_tokenizer() -> dict[str, np.ndarray]:
    """The goldens' weights by torch name: two of the released layers at a tenth of the width."""
    # RandomState's stream is frozen, and uniform draws need no libm: the same bits everywhere.
    random = np.random.RandomState(TOKENIZER_SEED)
    state = {}
    for name, (released_shape, _) in sorted(tokenizer_manifest().items()):
        if re.match(r"encoder\.blocks\.[2-5]\.", name):
            continue
        shape = [size // 10 if size >= 1280 else size for size in released_shape]
        scale = 0.1 if len(shape) == 1 else 2 / math.sqrt(math.prod(shape[1:]))
        values = name.endswith("_ln.weight") + scale * random.uniform(-1, 1, shape)
        state[name] = values.astype(np.float32)
    return state

"""Models to measure: dimensions by name, with random weights when there is no checkpoint."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax import checkpoint
from omni2_jax.config import DECODER_PARTS, FlowConfig, HiftConfig, Omni2Config, Qwen2Config, SpeechEncoderConfig
from omni2_jax.model import for_serving

TINY = Omni2Config(
    llm=Qwen2Config(vocabulary=512, width=64, layers=2, heads=4, kv_heads=2, hidden=128),
    speech_encoder=SpeechEncoderConfig(width=64, layers=2, heads=4),
    speech_lm=Qwen2Config(vocabulary=7168, width=64, layers=2, heads=4, kv_heads=2, hidden=128),
    flow=FlowConfig(
        width=64, heads=4, hidden=128, layers=2, channels=48, estimator_heads=4, estimator_head_size=16, blocks=1, mid_blocks=2
    ),
    hift=HiftConfig(channels=64, f0_channels=32),
    speaker=None,
)
SEVEN = Qwen2Config(vocabulary=152064, width=3584, layers=28, heads=28, kv_heads=4, hidden=18944, tied=False)
SIZES = {
    "tiny": dataclasses.replace(TINY, tokens=dataclasses.replace(TINY.tokens, speech=500, sep=500, unit_eos=499, text_eos=(498,))),
    "0.5b": Omni2Config(speaker=None),
    "7b": Omni2Config(llm=SEVEN, speaker=None),
}


def load(size: str, directory: Path | None, dtype: jnp.dtype) -> tuple[Omni2Config, nnx.GraphDef, dict]:
    """A checkpoint, or random weights of a size: the language side in `dtype`, the decoder in float32."""
    if directory is not None:
        config = Omni2Config.load(directory / "config.json").replace(speaker=None)
        return config, *for_serving(*checkpoint.load(directory, config, dtype))
    config = SIZES[size]
    graph, shapes = checkpoint.abstract(config)
    types = {part: jnp.float32 if part in DECODER_PARTS else dtype for part in shapes}

    @jax.jit
    def random(key):  # "rbg" draws two billion numbers in seconds, where the default generator takes minutes on a CPU
        leaves, tree = jax.tree.flatten({part: jax.tree.map(lambda s, t=types[part]: s.update(dtype=t), shapes[part]) for part in shapes})
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [jax.random.uniform(k, s.shape, s.dtype, -0.03, 0.03) for k, s in zip(keys, leaves, strict=True)])

    return config, *for_serving(graph, random(jax.random.key(0, impl="unsafe_rbg")))

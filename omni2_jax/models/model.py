"""The whole model, part by part: reading it is reading the paper's figure 1.

    log-mel -> speech encoder -> adapter -> LLM -> gate fusion -> speech LM -> flow matching -> vocoder

B batch, T time, M mel bins, D LLM width. A part that the checkpoint lacks is None.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import Omni2Config
from omni2_jax.models.adapter import Adapter
from omni2_jax.models.decoder import Decoder
from omni2_jax.models.flow.matching import Flow
from omni2_jax.models.fusion import GateFusion
from omni2_jax.models.layers import unstack
from omni2_jax.models.speaker import Speaker
from omni2_jax.models.speech_encoder import SpeechEncoder
from omni2_jax.models.vocoder.hift import Hift

Array = jax.Array

SPEECH = -200  # stands for one speech feature in a prompt's ids (the released code's SPEECH_TOKEN_INDEX, expanded)


class Model(nnx.Module):
    def __init__(self, config: Omni2Config, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.speech_encoder = c.speech_encoder and SpeechEncoder(c.speech_encoder, rngs)
        self.adapter = (
            c.adapter
            and c.speech_encoder
            and c.llm
            and Adapter(c.adapter, c.speech_encoder.width, c.llm.width, rngs)
        )
        self.llm = c.llm and Decoder(c.llm, rngs)
        fused = c.llm and c.speech_lm and c.mix != "text"
        self.fusion = GateFusion(c.llm.width, c.speech_lm.width, c.mix, rngs) if fused else None
        self.speech_lm = c.speech_lm and Decoder(c.speech_lm, rngs)
        self.flow = c.flow and Flow(c.flow, rngs)
        self.vocoder = c.vocoder and Hift(c.vocoder, rngs)
        self.speaker = c.speaker and Speaker(c.speaker, rngs)

    def hear(self, mel: Array) -> Array:
        """Log-mel of whole turns [B, 3000, M] -> speech features [B, 300, D]."""
        return self.adapter(self.speech_encoder(mel))

    def embed_prompt(self, ids: Array, features: Array, first: Array | int = 0) -> Array:
        """Prompt ids [B, T], SPEECH at each speech position, and the features [B, F, D] that go there from `first` on -> [B, T, D]."""
        speech = ids == SPEECH
        order = jnp.clip(first + jnp.cumsum(speech, -1) - 1, 0, features.shape[1] - 1)
        heard = jnp.take_along_axis(features, order[..., None], axis=1)
        return jnp.where(
            speech[..., None],
            heard.astype(features.dtype),
            self.llm.embed(ids).astype(features.dtype),
        )

    def fuse(self, hidden: Array, tokens: Array) -> Array:
        """LLM hidden states [..., D] and the text tokens they produced [...] -> speech-LM inputs [..., D']."""
        said = self.speech_lm.embed(tokens).astype(hidden.dtype)
        return said if self.fusion is None else self.fusion(hidden, said)


def for_serving(graph: nnx.GraphDef, params: dict) -> tuple[nnx.GraphDef, dict]:
    """The form to generate with on this platform: on a CPU the layers of both language models, and the flow's stages, in lists
    instead of stacked."""
    if jax.default_backend() != "cpu":
        return graph, params
    model = nnx.merge(graph, params)
    for lm in (model.llm, model.speech_lm):
        if lm is not None:
            lm.layers = unstack(lm.layers)
    if model.flow is not None:
        model.flow.estimator.middle = unstack(model.flow.estimator.middle)
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConstantKey:
    """Stands in for nnx.Rngs where only shapes are wanted; counting keys makes abstract tracing of many layers slow (3 s of 4)."""

    key: jax.Array

    def params(self) -> jax.Array:
        return self.key

    def split(self, count: int) -> "ConstantKey":
        return ConstantKey(jax.random.split(self.key, count))


def abstract_state(
    config: Omni2Config, build: Callable[..., nnx.Module] = Model
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph of the model `build(config, rngs)` and its parameters as shapes with their logical axes.

    Nothing is allocated.
    """
    return nnx.split(nnx.eval_shape(lambda: build(config, ConstantKey(jax.random.key(0)))))


def abstract_model(config: Omni2Config) -> tuple[nnx.GraphDef, dict]:
    """The same without the axes: ({part: tree of ShapeDtypeStruct})."""
    graph, state = abstract_state(config)
    return graph, nnx.to_pure_dict(state)

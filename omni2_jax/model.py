"""The whole model, part by part: reading it is reading the paper's figure 1.

    log-mel -> speech encoder -> adapter -> LLM -> gate fusion -> speech LM -> flow matching -> vocoder

B batch, T time, M mel bins, D LLM width. A part that the checkpoint lacks is None.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.adapter import Adapter
from omni2_jax.config import Omni2Config
from omni2_jax.flow.matching import Flow
from omni2_jax.fusion import GateFusion
from omni2_jax.hift import Hift
from omni2_jax.layers import unstack
from omni2_jax.qwen2 import Qwen2
from omni2_jax.speaker import Speaker
from omni2_jax.whisper import SpeechEncoder

Array = jax.Array

SPEECH = -200  # stands for one speech feature in a prompt's ids (the released code's SPEECH_TOKEN_INDEX, expanded)


class Model(nnx.Module):
    def __init__(self, config: Omni2Config, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.speech_encoder = c.speech_encoder and SpeechEncoder(c.speech_encoder, rngs)
        self.adapter = c.adapter and c.speech_encoder and c.llm and Adapter(c.adapter, c.speech_encoder.width, c.llm.width, rngs)
        self.llm = c.llm and Qwen2(c.llm, rngs)
        fused = c.llm and c.speech_lm and c.mix != "text"
        self.fusion = GateFusion(c.llm.width, c.speech_lm.width, c.mix, rngs) if fused else None
        self.speech_lm = c.speech_lm and Qwen2(c.speech_lm, rngs)
        self.flow = c.flow and Flow(c.flow, rngs)
        self.hift = c.hift and Hift(c.hift, rngs)
        self.speaker = c.speaker and Speaker(c.speaker, rngs)

    def hear(self, mel: Array) -> Array:
        """Log-mel of whole turns [B, 3000, M] -> speech features [B, 300, D]."""
        return self.adapter(self.speech_encoder(mel))

    def embed_prompt(self, ids: Array, features: Array, first: Array | int = 0) -> Array:
        """Prompt ids [B, T], SPEECH at each speech position, and the features [B, F, D] that go there from `first` on -> [B, T, D]."""
        speech = ids == SPEECH
        order = jnp.clip(first + jnp.cumsum(speech, -1) - 1, 0, features.shape[1] - 1)
        heard = jnp.take_along_axis(features, order[..., None], axis=1)
        return jnp.where(speech[..., None], heard.astype(features.dtype), self.llm.embed(ids).astype(features.dtype))

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

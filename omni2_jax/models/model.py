"""The whole model, its parts in the order of the paper's figure 1.

    log-mel -> speech encoder -> adapter -> LLM -> gate fusion -> speech LM -> flow -> vocoder

B batch, T time, M mel bins, F speech features, D LLM width, D' speech-LM width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.config import DECODER_PARTS, Omni2Config
from omni2_jax.models.adapter import Adapter
from omni2_jax.models.decoder import Decoder
from omni2_jax.models.flow.matching import Flow
from omni2_jax.models.forms import STACKED
from omni2_jax.models.fusion import GateFusion
from omni2_jax.models.speaker import Speaker
from omni2_jax.models.speech_encoder import SpeechEncoder
from omni2_jax.models.vocoder import build as build_vocoder

Array = jax.Array

SPEECH = -200  # a speech position in a prompt's ids (the released SPEECH_TOKEN_INDEX, expanded)


class Model(nnx.Module):
    """All parts of a configuration as attributes, named as in `config.PARTS`; None if absent.

    The adapter exists if the encoder and the LLM do, the fusion if both language models do and
    `config.mix` is not "text". Generation and training call the parts themselves; the methods here
    are the places where two parts meet.
    """

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
        self.fusion = (
            GateFusion(c.llm.width, c.speech_lm.width, c.mix, rngs)
            if c.llm and c.speech_lm and c.mix != "text"
            else None
        )
        self.speech_lm = c.speech_lm and Decoder(c.speech_lm, rngs)
        self.flow = c.flow and Flow(c.flow, rngs)
        self.vocoder = c.vocoder and build_vocoder(c.vocoder, rngs)
        self.speaker = c.speaker and Speaker(c.speaker, rngs)

        self.form = STACKED  # as it is read from a checkpoint; `forms.arrange` changes it

    def encode_speech(self, mel: Array) -> Array:
        """Log-mel of segments [B, 2T, M] -> speech features [B, F, D]: 300 of 30 s."""
        return self.adapter(self.speech_encoder(mel))

    def embed_prompt(self, ids: Array, features: Array, first: Array | int = 0) -> Array:
        """Prompt ids [B, T] -> LLM inputs [B, T, D] in the dtype of `features`.

        The n-th position whose id is SPEECH gets feature `first` + n of `features` [B, F, D].
        """
        speech = ids == SPEECH
        index = jnp.clip(first + jnp.cumsum(speech, -1) - 1, 0, features.shape[1] - 1)
        at_speech = jnp.take_along_axis(features, index[..., None], axis=1)
        return jnp.where(
            speech[..., None],
            at_speech.astype(features.dtype),
            self.llm.embed(ids).astype(features.dtype),
        )

    def fuse(self, hidden: Array, tokens: Array) -> Array:
        """LLM hidden states [..., D] and the tokens they produced [...] -> inputs [..., D'].

        They are those of the speech LM. Without a fusion, the hidden states are not read.
        """
        embedding = self.speech_lm.embed(tokens).astype(hidden.dtype)
        return embedding if self.fusion is None else self.fusion(hidden, embedding)


def language_dtype(params: Mapping[str, Any]) -> jnp.dtype:
    """The dtype of the LLM in parameters {part: nested dict}, and so of the whole language side."""
    return params["llm"]["norm"]["scale"].dtype


def part_dtype(part: str, language: jnp.dtype | type) -> jnp.dtype:
    """The dtype of a part's parameters: `language`, but float32 for flow, vocoder and speaker.

    The flow's solver and the vocoder's phase need float32. For a GPU, `forms.for_serving` then
    makes the matrices of the flow's estimator bfloat16.
    """
    return jnp.dtype(jnp.float32 if part in DECODER_PARTS else language)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConstantKey:
    """Stands in for nnx.Rngs where only shapes are wanted.

    Counting keys would make abstract tracing of many layers slow: 3 s of 4.
    """

    key: jax.Array

    def params(self) -> jax.Array:
        """The same key every time."""
        return self.key

    def split(self, count: int) -> "ConstantKey":
        """One key for each of `count` stacked modules."""
        return ConstantKey(jax.random.split(self.key, count))


def abstract_state(
    config: Omni2Config, build: Callable[..., nnx.Module] = Model
) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph of the model `build(config, rngs)`, and its parameters as shapes with their axes.

    Nothing is allocated.
    """
    return nnx.split(nnx.eval_shape(lambda: build(config, ConstantKey(jax.random.key(0)))))


def abstract_model(config: Omni2Config) -> tuple[nnx.GraphDef, dict]:
    """The model's graph and its parameters as a nested dict {part: ...} of ShapeDtypeStruct."""
    graph, state = abstract_state(config)
    return graph, nnx.to_pure_dict(state)

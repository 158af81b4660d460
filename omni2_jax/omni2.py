"""What a user holds: a loaded checkpoint that answers spoken questions in text and speech.

    model = Omni2.load("CKPT")
    answer = model.answer("question.wav", voice="jane")
    answer.text, answer.units, answer.waveform
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax import audio, checkpoint, readwrite, voices
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.readwrite import ReadWriteState
from omni2_jax.sampling import Sampling
from omni2_jax.tokenizer import Tokenizer, parse_units

Turn = str | Path | np.ndarray
BUCKET = 128  # prompts and caches are padded to a multiple of this, so that few shapes are ever compiled


@dataclass(frozen=True)
class Options:
    """How to generate. None = what the checkpoint's generation_config.json says, else off."""

    temperature: float = 0.0  # of the text; 0 = greedy
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = 256
    unit_temperature: float = 1.0  # the paper's; greedy falls into repetition
    unit_top_k: int = 50  # in force in the released code
    unit_vocabulary: str = "units"  # "all" = any token can be sampled, as released
    max_flush_units: int = 1024  # speech tokens after the end of the text
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Text; units (25 a second); `unit_text` as the released scripts spell it; waveform float32 [N] at 24 kHz, or None."""

    text: str
    units: list[int]
    unit_text: str
    waveform: np.ndarray | None


class Omni2:
    """A checkpoint in memory. `load` it; `answer` a wav or a conversation."""

    def __init__(self, directory: Path, config: Omni2Config, graph: nnx.GraphDef, params: dict, tokenizer: Tokenizer, defaults: dict):
        self.directory, self.config, self.params, self.tokenizer, self.defaults = directory, config, params, tokenizer, defaults
        self.graph = graph
        model = functools.partial(nnx.merge, graph)
        self.hear = jax.jit(lambda params, clips: model(params).hear(audio.log_mel(clips).astype(self.dtype)))
        self.prefill = jax.jit(lambda params, *inputs: readwrite.prefill(model(params), *inputs), donate_argnums=1)
        self.read_write = jax.jit(
            lambda params, state, units_only: readwrite.read_write(model(params), state, units_only), static_argnums=2, donate_argnums=1
        )
        self.speak = jax.jit(lambda params, *inputs: model(params).speak(*inputs))

    @property
    def dtype(self) -> jnp.dtype:
        return self.params["llm"]["norm"]["scale"].dtype

    @classmethod
    def load(cls, directory: str | Path, dtype: jnp.dtype | None = None, decoder: bool = True) -> "Omni2":
        """Read a checkpoint directory. dtype of the language side: bfloat16 on accelerators, float32 on the CPU. decoder=False skips the audio."""
        directory = Path(directory)
        config = Omni2Config.load(directory / "config.json")
        missing = [part for part in LANGUAGE_PARTS if part not in checkpoint.parts(directory)]
        if missing:
            raise ValueError(f"{directory} cannot answer: it lacks {', '.join(missing)} (convert a LLaMA-Omni2 release with --omni2)")
        dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        needed = config.only(*LANGUAGE_PARTS, *(("flow", "hift") if decoder else ()))
        graph, params = checkpoint.load(directory, needed, dtype)
        positions = config.speech_encoder.frames // config.adapter.stride
        generation = directory / "generation_config.json"
        defaults = json.loads(generation.read_text()) if generation.exists() else {}
        return cls(directory, config, graph, params, Tokenizer(directory, config, positions), defaults)

    # ---- hearing and answering ----

    def features(self, clips: Sequence[np.ndarray]) -> jax.Array:
        """Speech features [n, 300, D] of turns of 16 kHz samples, each padded to 30 s."""
        padded, _ = audio.pad(clips, audio.RATE * audio.TURN_SECONDS)
        return jnp.concatenate([self.hear(self.params, clip[None]) for clip in jnp.asarray(padded)])

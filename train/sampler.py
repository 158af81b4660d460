"""Answers during training: validation questions, answered through the same streaming step that
users run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint import parameters, voices
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import LANGUAGE_PARTS
from omni2_jax.generate.omni2 import Answer, Omni2, Options
from omni2_jax.models.forms import for_serving
from omni2_jax.models.model import abstract_model, part_dtype
from omni2_jax.train.weights import configure, without_prefix

if TYPE_CHECKING:
    from omni2_jax.train.stages.base import Stage

FLUSH_UNITS = 500  # at most, after the text of a sample has ended: 20 s


class Sampler:
    """Answers with the current weights, and with the checkpoint's for parts that are not loaded."""

    def __init__(self, stage: "Stage", directory: Path, tokenizer: Tokenizer):
        self.directory, self.tokenizer = directory, tokenizer
        stored = parameters.parts(directory)
        language = [part for part in LANGUAGE_PARTS if part in stored]
        decoder = ["flow", "vocoder"]
        # Without a decoder or a voice an answer is text and units only.
        is_audible = set(decoder) <= set(stored) and voices.names(directory)
        self.parts = [*language, *decoder] if is_audible else language
        self.config = stage.sample_config(configure(stage, directory))
        self.options = Options(
            max_new_tokens=stage.train.max_sample_text,
            max_flush_units=FLUSH_UNITS,
            seed=stage.train.seed,
        )
        self.model: Omni2 | None = None
        self.stored_params: dict[str, dict] = {}  # of the parts that are not in training

    @classmethod
    def of(cls, stage: "Stage", directory: Path, tokenizer: Tokenizer | None) -> "Sampler | None":
        """None if no question can be answered.

        That is so if the stage is not judged by answers, if the checkpoint lacks a part of the
        language side, if the stage has no tokenizer, or if the run has several processes.
        """
        complete = set(LANGUAGE_PARTS) <= set(parameters.parts(directory))
        wanted = stage.answers and stage.train.samples
        if not (wanted and complete and tokenizer and jax.process_count() == 1):
            return None
        return cls(stage, directory, tokenizer)

    def update(self, params: Mapping[str, jax.Array]) -> None:
        """Answer with these parameters by path from now on."""
        language_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        graph, shapes = abstract_model(self.config.only(*self.parts))
        nested = {}
        for part, tree in shapes.items():
            dtype = part_dtype(part, language_dtype)
            current = without_prefix(params, part)
            if current:
                # On several devices the parameters are gathered on the first: one conversation fits
                # there.
                leaves = {
                    path: jax.device_put(current[path].astype(dtype), jax.devices()[0])
                    for path in parameters.flatten(tree)
                }
                nested[part] = parameters.unflatten(tree, leaves)
                continue
            if part not in self.stored_params:
                self.stored_params[part] = parameters.load_part(self.directory, part, tree, dtype)
            nested[part] = self.stored_params[part]
        graph, nested = for_serving(graph, nested)
        if self.model is None:
            config = self.config.only(*self.parts, "speaker")
            self.model = Omni2(self.directory, config, graph, nested, self.tokenizer, {})
        self.model.update(nested)

    def answer(self, question: np.ndarray) -> Answer:
        """The answer to a spoken question [N] at 16 kHz. `update` has to be called first."""
        assert self.model is not None
        return self.model.answer(question, options=self.options)

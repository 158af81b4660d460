"""What the model says while it is trained: validation questions answered through the same streaming step that users run."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint import parameters, voices
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import DECODER_PARTS, LANGUAGE_PARTS
from omni2_jax.generate.omni2 import Answer, Omni2, Options
from omni2_jax.models.model import abstract_model, for_serving
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.weights import configure

UNITS = 500  # of a sample after its text has ended: 20 s


class Sampler:
    """Answers with the weights of the moment; parts that the stage does not load are those of the checkpoint it began with."""

    def __init__(self, train: TrainConfig, directory: Path, tokenizer: Tokenizer):
        self.train, self.directory, self.tokenizer = train, directory, tokenizer
        parts = [
            part
            for part in (*LANGUAGE_PARTS, "flow", "vocoder")
            if part in parameters.parts(directory)
        ]
        speaks = {"flow", "vocoder"} <= set(parts) and voices.names(
            directory
        )  # without a voice text and units are all there is
        self.parts = parts if speaks else [part for part in parts if part in LANGUAGE_PARTS]
        config = configure(train, directory)
        # Before stage 2 gate fusion is not trained: the speech LM hears the text alone, as it is trained to in 1b.
        self.config = config.replace(mix="text") if train.stage in ("1a", "1b") else config
        self.options = Options(
            max_new_tokens=train.max_sample_text, max_flush_units=UNITS, seed=train.seed
        )
        self.model: Omni2 | None = None
        self.rest: dict = {}

    @classmethod
    def of(
        cls, train: TrainConfig, directory: Path, tokenizer: Tokenizer | None
    ) -> "Sampler | None":
        """None where nothing can be answered: the checkpoint lacks a part of the language side, or the run has several processes."""
        whole = all(part in parameters.parts(directory) for part in LANGUAGE_PARTS)
        return (
            cls(train, directory, tokenizer)
            if train.samples and whole and tokenizer and jax.process_count() == 1
            else None
        )

    def update(self, params: Mapping[str, jax.Array]) -> None:
        """Answer with these parameters, {path: array}, from now on."""
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        graph, shapes = abstract_model(self.config.only(*self.parts))
        whole = {}
        for part, tree in shapes.items():
            kind = jnp.float32 if part in DECODER_PARTS else dtype
            ours = {
                path.removeprefix(f"{part}."): leaf
                for path, leaf in params.items()
                if path.startswith(f"{part}.")
            }
            if not ours and part not in self.rest:
                self.rest[part] = parameters.load_part(self.directory, part, tree, kind)
            # (On several devices the parameters are gathered on the first: one speaker fits there.)
            gathered = lambda path, ours=ours, kind=kind: jax.device_put(
                ours[path].astype(kind), jax.devices()[0]
            )  # noqa: E731
            leaves = (
                parameters.flatten(self.rest[part])
                if not ours
                else {path: gathered(path) for path in parameters.flatten(tree)}
            )
            whole[part] = jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))
        graph, whole = for_serving(graph, whole)
        if self.model is None:
            self.model = Omni2(
                self.directory,
                self.config.only(*self.parts, "speaker"),
                graph,
                whole,
                self.tokenizer,
                {},
            )
        self.model.update(whole)

    def answer(self, question: np.ndarray) -> Answer:
        """A spoken question [N] at 16 kHz."""
        return self.model.answer(question, options=self.options)

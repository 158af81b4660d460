"""`python -m benchmarks.quantized`: what a checkpoint with int8 weights loses against its original.

The original answers spoken questions greedily. Both models then read its answers: how often is
their most likely token the same, and how much less likely does the quantized one think the text?
Then both speak the same texts, greedily: how many units agree until one of them differs first, and
in all.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table
import typer
from flax import nnx

from omni2_jax.cli.paths import directory
from omni2_jax.console import progress_bar, run_function
from omni2_jax.convert.precision import quantized_parts
from omni2_jax.generate.omni2 import Omni2, join
from omni2_jax.generate.options import Options
from omni2_jax.generate.prompts import load_segments
from omni2_jax.generate.questions import read_questions

Array = jax.Array
BUCKET = 256  # prompts with their answers are padded to multiples of it
GREEDY = Options(unit_temperature=0.0, max_new_tokens=64, max_flush_units=256, long_turns="split")


@dataclass(frozen=True)
class Comparison:
    """Two models on one question.

    tokens, equal_tokens: of the original's answer. losses: negative log-likelihood of its tokens,
    (original, quantized). units: of the longer spoken answer; equal_units: that agree at their
    place; first_units: that agree before the first difference.
    """

    tokens: int
    equal_tokens: int
    losses: tuple[float, float]
    units: int
    equal_units: int
    first_units: int


def compare(readers: Sequence["Reader"], sound: Path) -> Comparison:
    """The original and the quantized model on a spoken question."""
    replies = list(readers[0].model.session(options=GREEDY, turns=1).respond(sound))
    text = "".join(reply.text for reply in replies)
    tokens = [token for reply in replies for token in reply.text_tokens]
    chances = [reader.log_probabilities(sound, tokens) for reader in readers]
    best = [each.argmax(-1) for each in chances]
    losses = [-each[np.arange(len(tokens)), tokens].sum() for each in chances]
    said = [units_of(reader.model, sound, text) for reader in readers] if text else [[], []]
    same = [first == second for first, second in zip(*said, strict=False)]
    return Comparison(
        tokens=len(tokens),
        equal_tokens=int((best[0] == best[1]).sum()),
        losses=(float(losses[0]), float(losses[1])),
        units=max(map(len, said)),
        equal_units=sum(same),
        first_units=same.index(False) if False in same else len(same),
    )


def units_of(model: Omni2, sound: Path, text: str) -> list[int]:
    """The units with which the model says a text that it is made to answer with."""
    session = model.session(options=GREEDY, turns=1)
    return join(session.reply(model.hear(sound, GREEDY.long_turns), say=text.strip()), False).units


class Reader:
    """A model whose LLM reads an answer instead of generating one."""

    def __init__(self, model: Omni2):
        self.model = model

        def read(params: dict, ids: Array, features: Array, positions: Array) -> Array:
            parts = nnx.merge(model.graph, params)
            hidden, _ = parts.llm(parts.embed_prompt(ids, features), positions)
            return jax.nn.log_softmax(parts.llm.logits(hidden)[0])

        self.read = jax.jit(read)

    def log_probabilities(self, sound: Path, tokens: Sequence[int]) -> np.ndarray:
        """[N, V] at the N tokens of an answer to a recording, each after those before it."""
        model = self.model
        clips = load_segments(sound, GREEDY.long_turns, model.config.segment_samples)
        features = jnp.concatenate(model.encode(clips))[None]
        ids = [*model.tokenizer.prompt([len(clips)]), *tokens]
        places = np.arange(-(-len(ids) // BUCKET) * BUCKET)
        padded = np.pad(np.asarray(ids, np.int32), (0, len(places) - len(ids)))
        positions = np.where(places < len(ids), places, -1)
        chances = np.asarray(self.read(model.params, padded[None], features, positions[None]))
        return chances[len(ids) - len(tokens) - 1 : len(ids) - 1]


def summary(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The figures over all questions, by name."""
    tokens = sum(each.tokens for each in comparisons)
    units = max(1, sum(each.units for each in comparisons))
    original, quantized = (sum(each.losses[i] for each in comparisons) for i in (0, 1))
    return {
        "questions": len(comparisons),
        "tokens": tokens,
        "equal tokens": sum(each.equal_tokens for each in comparisons) / tokens,
        "perplexity": float(np.exp(original / tokens)),
        "perplexity ratio": float(np.exp((quantized - original) / tokens)),
        "units": units,
        "equal units": sum(each.equal_units for each in comparisons) / units,
        "units before the first difference": sum(e.first_units for e in comparisons) / units,
    }


def main(
    checkpoint: Annotated[Path, typer.Option(parser=directory, help="With int8 weights.")],
    against: Annotated[Path, typer.Option(parser=directory, help="The checkpoint it was made of.")],
    questions: Annotated[
        Path, typer.Option(help="A questions.json; the first turn of each is asked.")
    ] = Path("examples/questions.json"),
    limit: Annotated[int, typer.Option(min=1, help="Questions at most.")] = 50,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare a checkpoint with int8 weights with the one that it was made of."""
    sounds = [item.turns[0] for item in read_questions(questions, "split")][:limit]
    quantized, original = (Omni2.load(path, decoder=False) for path in (checkpoint, against))
    if not quantized_parts(quantized.config) or quantized_parts(original.config):
        raise ValueError("expected int8 weights in --checkpoint, and none in --against")
    readers = [Reader(original), Reader(quantized)]
    with progress_bar(rich.progress.MofNCompleteColumn()) as bar:
        tracked = bar.track(sounds, description="comparing")
        comparisons = [compare(readers, Path(sound)) for sound in tracked]
    figures = summary(comparisons)
    table = rich.table.Table("measure", "value", title=f"{checkpoint} against {against}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    rich.console.Console().print(table)
    if out:
        details = [dataclasses.asdict(each) for each in comparisons]
        out.write_text(json.dumps({"figures": figures, "questions": details}, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

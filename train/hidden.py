"""`python -m train.hidden`: the LLM's hidden states behind every text token of a data set, computed once for all of stage 2.

The LLM is frozen there, so they never change; with them on disk neither it nor the speech encoder is loaded, and no question is heard
again. For a text of n tokens that is n * D numbers: 0.7 MB for 100 tokens of the 7B in bfloat16.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import rich.progress
import typer

from omni2_jax import checkpoint, command, sharding
from train import config, stages, weights
from train.config import Train
from train.dataset import SHARD_BYTES, Shards
from train.loop import Data, Run
from train.states import identity

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def hidden(
    file: Annotated[Path, typer.Option("--config", help="The config of the stage 2 run that will read them.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE")] = None,
) -> None:
    """Compute the LLM's hidden states for stage 2."""
    compute(config.read(file, changes or []), out)


def compute(train: Train, out: Path, devices: Sequence[jax.Device] | None = None) -> None:
    """Write the states that a stage 2 run reads. Raises ValueError for another stage; `out` appears whole or not at all."""
    if train.stage != "2":
        raise ValueError(f"a run of stage {train.stage} reads no hidden states; stage 2 does")
    train = dataclasses.replace(train, hidden=None, microbatches=1, steps=None, epochs=1.0)
    with checkpoint.aside(out) as work:
        run = Run(train, work / "run", devices)
        with sharding.use(run.mesh):
            loaded, trained, frozen = weights.load(train, run.start, run.mesh)
            values = frozen | trained
            read = jax.jit(lambda values, batch: stages.read_dialogue(loaded.model(values), train, batch))
            for name, data in {"data": run.data, "validation": run.validation}.items():
                if data is not None:
                    write(work / name, data, lambda batch: read(values, batch), run.config.llm.width, train.dtype)


def write(folder: Path, data: Data, read: Callable, width: int, dtype: str) -> None:
    """The states of one data set."""
    folder.mkdir()
    shards, places = Shards(folder, "states", SHARD_BYTES), [None] * len(data.examples.data)
    batches = zip(data.batches, data.loader.start(0), strict=True)
    for batch, (placed, raw) in rich.progress.track(batches, f"hidden states of {data.examples.data.path}", total=len(data.batches)):
        states = np.asarray(read({name: placed[name][0] for name in ("audio", "ids")}).astype(dtype))
        for row, number in enumerate(batch.rows):
            if number >= 0:
                source = raw["source"][0, row]
                # Every text token is one row of one reply: their positions, ascending, are the order of the text.
                at = np.sort(source[source >= 0])
                places[data.found.items[number].dialogue] = shards.add(states[row, at].tobytes())
    shards.close()
    told = {"data": identity(data.examples.data), "width": width, "dtype": dtype, "places": places}
    (folder / "hidden.json").write_text(json.dumps(told) + "\n")


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()

"""The LLM's hidden states behind every text token of a data set, computed once for all of stage 2.

The LLM is frozen there, so they never change; with them on disk neither it nor the speech encoder is loaded, and no question is heard
again. For a text of n tokens that is n * D numbers: 0.7 MB for 100 tokens of the 7B in bfloat16.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import rich.progress

from omni2_jax import files, sharding
from omni2_jax.train import stages, weights
from omni2_jax.train.data.writer import SHARD_BYTES, Shards
from omni2_jax.train.hidden_states import identity
from omni2_jax.train.loop import Data, Run
from omni2_jax.train.settings import TrainConfig


def compute(train: TrainConfig, out: Path, devices: Sequence[jax.Device] | None = None) -> None:
    """Write the states that a stage 2 run reads. Raises ValueError for another stage; `out` appears whole or not at all."""
    if train.stage != "2":
        raise ValueError(f"a run of stage {train.stage} reads no hidden states; stage 2 does")
    train = dataclasses.replace(train, hidden=None, microbatches=1, steps=None, epochs=1.0)
    with files.atomic_directory(out) as work:
        run = Run(train, work / "run", devices)
        with sharding.use(run.mesh):
            loaded, trained, frozen = weights.load(train, run.start, run.mesh)
            values = frozen | trained
            read = jax.jit(
                lambda values, batch: stages.read_dialogue(loaded.model(values), train, batch)
            )
            for name, data in {"data": run.data, "validation": run.validation}.items():
                if data is not None:
                    write(
                        work / name,
                        data,
                        lambda batch: read(values, batch),
                        run.config.llm.width,
                        train.dtype,
                    )


def write(folder: Path, data: Data, read: Callable, width: int, dtype: str) -> None:
    """The states of one data set."""
    folder.mkdir()
    shards, places = Shards(folder, "states", SHARD_BYTES), [None] * len(data.examples.data)
    batches = zip(data.batches, data.loader.start(0), strict=True)
    for batch, (placed, raw) in rich.progress.track(
        batches, f"hidden states of {data.examples.data.path}", total=len(data.batches)
    ):
        states = np.asarray(
            read({name: placed[name][0] for name in ("audio", "ids")}).astype(dtype)
        )
        for row, number in enumerate(batch.rows):
            if number >= 0:
                source = raw["source"][0, row]
                # Every text token is one row of one reply: their positions, ascending, are the order of the text.
                at = np.sort(source[source >= 0])
                places[data.found.items[number].dialogue] = shards.add(states[row, at].tobytes())
    shards.close()
    told = {"data": identity(data.examples.data), "width": width, "dtype": dtype, "places": places}
    (folder / "hidden.json").write_text(json.dumps(told) + "\n")

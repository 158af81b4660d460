"""`omni2 hidden`: the LLM's hidden states behind every text token of a data set, computed once for
stage 2.

The LLM is frozen in stage 2, so its states never change. With the states on disk neither the LLM
nor the speech encoder is loaded, and no question is read. A text of n tokens takes n * D numbers:
0.7 MB for 100 tokens of the 7B model in bfloat16.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from omni2_jax import files, sharding
from omni2_jax.devices import Device
from omni2_jax.train import weights
from omni2_jax.train.examples import Item, Row
from omni2_jax.train.hidden_states import HiddenStates, origin
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.stages.speech_to_speech import SpeechToSpeech
from omni2_jax.train.stages.speech_to_text import read_dialogue


def compute(train: TrainConfig, out: Path, devices: Sequence[Device] | None = None) -> None:
    """Write the states that a run with these settings reads; `out` appears whole or not at all.

    devices: default all. Raises ValueError for a stage that reads no hidden states, and what `Run`
    raises.
    """
    if not isinstance(stage_of(train), SpeechToSpeech):
        raise ValueError(f"a run of stage {train.stage} reads no hidden states; stage 2 does")
    train = dataclasses.replace(train, hidden=None, microbatches=1, steps=None, epochs=1.0)
    with files.atomic_directory(out) as work:
        run = Run(train, work / "run", devices)
        with sharding.use(run.mesh):
            loaded, trained, frozen = weights.load(run.stage, run.start, run.mesh)
            values = frozen | trained

            @jax.jit
            def read(values: weights.Params, batch: dict) -> jax.Array:
                return read_dialogue(loaded.model(values), train, batch)

            def states(batch: dict[str, jax.Array]) -> np.ndarray:
                names = ("audio", "frames", "ids")
                inputs = {name: batch[name][0] for name in names if name in batch}
                return np.asarray(read(values, inputs).astype(train.dtype))

            width = run.config.llm.width
            metadata = {"width": width, "dtype": train.dtype, **origin(train)}
            for name, split in {"data": run.data, "validation": run.validation}.items():
                if split is not None:
                    rows = HiddenStates.arrays(split, states, behind_text)
                    HiddenStates.write(work / name, split, metadata, rows)


def behind_text(states: np.ndarray, row: Row, item: Item) -> np.ndarray:
    """Of the states [T, D] of a row those behind the text tokens of its replies, [n, D]."""
    source = row["source"]
    # Each text token stands in one reply, so ascending positions are the order of the text.
    return states[np.sort(source[source >= 0])]

"""Training runs at toy size, the data set that they read, and the numbers that they report."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from omni2_jax.configs import stage1b
from omni2_jax.train.data import prepare
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig
from tests.support.paths import EXAMPLES

REPLIES = Bucket(0, 0, 64)  # for the spoken replies of the examples
TOY = {
    "batch": 3,
    "steps": 3,
    "optimizer": OptimizerConfig(peak=5e-3),
    "dtype": "float32",
    "workers": 1,
    "loss_block": 1024,
    "buckets": (REPLIES,),
}


def toy_config(
    config: TrainConfig, checkpoint: Path | str, data: Path | str, /, **changes
) -> TrainConfig:
    """A stage as its config file has it, at toy size, with `changes`."""
    paths = {"checkpoint": str(checkpoint), "data": str(data)}
    return dataclasses.replace(config, **(TOY | paths | changes))


def toy_run(checkpoint: Path, data: Path, /, **changes) -> TrainConfig:
    """Four steps of stage 1b, which is quick to compile, saved after every second step."""
    sizes = {"steps": 4, "batch": 8, "loss_block": 64, "save_every": 2, "keep": 9}
    return toy_config(stage1b.config, checkpoint, data, **(sizes | changes))


def prepared(folder: Path, names: Collection[str], units: int = 6561) -> Path:
    """A data set of some dialogues of examples/training, with random units as their replies.

    units: how many different ones there are.
    """
    spoken, random = EXAMPLES / "training", np.random.default_rng(0)
    dialogues = [json.loads(line) for line in (spoken / "data.jsonl").read_text().splitlines()]
    chosen = [dialogue for dialogue in dialogues if dialogue["id"] in names]
    for dialogue in chosen:
        for turn in dialogue["turns"]:
            turn["audio"] = str(spoken / turn["audio"])
            if turn["role"] == "assistant":
                turn["units"] = random.integers(0, units, 35).tolist()
    (folder / "data.jsonl").write_text("".join(json.dumps(dialogue) + "\n" for dialogue in chosen))
    prepare.prepare(folder, folder / "data")
    return folder / "data"


def losses(run: Path) -> list[float]:
    """The loss of every step, in the order of metrics.jsonl."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def reported(run: Path, name: str = "loss") -> dict[int, float]:
    """A number by step, from metrics.jsonl; asserts that no step reports it twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line[name] for line in lines if name in line}
    assert len(by_step) == sum(name in line for line in lines)
    return by_step


def train(settings: TrainConfig, out: Path) -> Path:
    """Train on one device -> the run's directory."""
    Run(settings, out, jax.devices()[:1]).go()
    return out


def saved_state(run: Path, step: int) -> dict:
    """The state that a run has saved after a step, as nested dicts."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore((run / "steps" / str(step) / "default").absolute())

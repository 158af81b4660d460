"""Training on real dialogues at toy size: every stage learns, and frozen parts stay equal.

The stages 1a, 1b and 2 start from a checkpoint from nothing, whose window of 2 s is quick.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from omni2_jax.checkpoint import parameters
from omni2_jax.configs import flow, stage1a, stage1b, stage2
from omni2_jax.generate.omni2 import Omni2, Options
from omni2_jax.train import compute_hidden
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig
from tests.support.runs import REPLIES, losses, prepared, reported, toy_config

pytestmark = pytest.mark.slow

GREEDY = Options(unit_temperature=0, max_new_tokens=60, max_flush_units=100)


def toy(
    config: TrainConfig, start: Path, data: Path, steps: int, peak: float, bucket: Bucket, **changes
) -> TrainConfig:
    """A stage as its config file has it, at toy size."""
    sizes = {"steps": steps, "batch": 4, "buckets": (bucket,), "save_every": 1000}
    schedule = {"validate_every": 1000, "optimizer": OptimizerConfig(peak=peak)}
    return toy_config(config, start, data, **(sizes | schedule | changes))


def run(train: TrainConfig, out: Path) -> None:
    Run(train, out, jax.devices()[:1]).go()


SPOKEN_TURNS = Bucket(3, 220)
NAMES = ("sea", "cats", "bread", "tea")  # all four: five questions, each with its own answer


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("talks"), NAMES, units=81)


@pytest.fixture(scope="module")
def chain(new_checkpoint, talks, tmp_path_factory) -> dict[str, Path]:
    """Runs of the stages 1a, 1b and 2, each from the checkpoint of the one before it."""
    out = tmp_path_factory.mktemp("chain")
    run(toy(stage1a.config, new_checkpoint, talks, 80, 1e-2, SPOKEN_TURNS), out / "1a")
    run(toy(stage1b.config, out / "1a" / "final", talks, 150, 1e-2, REPLIES, batch=5), out / "1b")
    both = Bucket(3, 220, 64)
    settings = toy(stage2.config, out / "1b" / "final", talks, 60, 1e-2, both)
    compute_hidden.compute(settings, out / "hidden", jax.devices()[:1])
    run(dataclasses.replace(settings, hidden=str(out / "hidden")), out / "2")
    run(
        dataclasses.replace(settings, steps=1, optimizer=OptimizerConfig(peak=5e-3, warmup=0)),
        out / "2-computed",
    )
    return {"start": new_checkpoint} | {
        stage: out / stage for stage in ("1a", "1b", "2", "2-computed")
    }


def files(directory: Path, part: str) -> dict[str, bytes]:
    """The files of a part by name, with their content."""
    folder = directory / "params" / part
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- it learns


@pytest.mark.parametrize("stage", ["1a", "1b", "2"])
def test_stage_overfits(chain, stage):
    values = losses(chain[stage])
    assert values[-1] < 0.03 and (stage == "2" or values[0] > 4)


def test_hidden_states_from_the_disk(chain):
    """The first loss is equal, bit for bit, to that of a run which computes the states itself."""
    assert losses(chain["2"])[0] == losses(chain["2-computed"])[0]


def test_hidden_states_of_other_data(chain, new_checkpoint, tmp_path):
    other = prepared(tmp_path, ("sea",), units=81)
    settings = toy(
        stage2.config,
        new_checkpoint,
        other,
        1,
        1e-3,
        SPOKEN_TURNS,
        hidden=str(chain["2"].parent / "hidden"),
    )
    with pytest.raises(
        ValueError,
        match=r"hidden/data was made from other data than .*, "
        r"or by another adapter, LLM or speech encoder$",
    ):
        run(settings, tmp_path / "run")


def test_answer_of_a_training_example(chain, talks):
    """The streaming step answers the training questions with their replies, text and every unit."""
    model, data = Omni2.load(chain["2"] / "final", decoder=False), Dataset(talks)
    for index in range(len(data)):
        question, reply = data.dialogue(index).turns[:2]
        answer = model.answer(data.clip(question.clip), options=GREEDY)
        assert answer.text == reply.text
        assert answer.units == reply.units.tolist()


def test_frozen_parts_do_not_change_by_a_bit(chain):
    """The files of frozen parts are equal; those of trained parts are not."""
    trained = {"1a": {"adapter", "llm"}, "1b": {"speech_lm"}, "2": {"fusion", "speech_lm"}}
    before = chain["start"]
    for stage, changing in trained.items():
        after = chain[stage] / "final"
        parts = parameters.parts(before)
        assert parameters.parts(after) == parts
        assert {part for part in parts if files(before, part) != files(after, part)} == changing
        before = after


@pytest.mark.nightly  # .ci/run trains a smaller flow: tests/test_flow_stage.py
def test_flow_learns_a_voice(checkpoint_dir, tmp_path):
    """The validation loss, whose times and noises are always the same, falls from each validation
    to the next, and below half of the first training losses. The fixed noise does not change.
    """
    talks = prepared(tmp_path, NAMES)
    validation = {"validation": str(talks), "validate_every": 20}
    settings = toy(flow.config, checkpoint_dir, talks, 80, 4e-3, Bucket(0, 0, 40), batch=5)
    run(dataclasses.replace(settings, **validation), tmp_path / "run")
    measured = list(reported(tmp_path / "run", "validation_loss").values())
    assert measured == sorted(measured, reverse=True) and len(set(measured)) == 4
    first = list(reported(tmp_path / "run").values())[:5]
    assert measured[-1] < np.mean(first) / 2
    before, after = (
        parameters.stored(directory, "flow")["noise"].read()
        for directory in (checkpoint_dir, tmp_path / "run" / "final")
    )
    np.testing.assert_array_equal(before, after)

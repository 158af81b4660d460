"""What `omni2 train` refuses in one line before it compiles or writes anything, and a NaN loss."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from omni2_jax.cli.main import main
from omni2_jax.train import loop, saved_states
from omni2_jax.train.data.records import Dialogue, Turn
from omni2_jax.train.data.writer import Writer
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig
from tests.support.releases import linked, replace
from tests.support.runs import reported

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "backend_compile" in name else None
)


@pytest.fixture
def error_line(monkeypatch) -> Callable[..., str]:
    """The error line of `omni2 train`, run in this process."""

    def error_line(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["omni2", "train", *arguments])
        monkeypatch.setattr(loop, "Run", functools.partial(Run, devices=jax.devices()[:1]))
        with pytest.raises(SystemExit) as exit:
            main()
        assert str(exit.value.code).startswith("error: ") and "\n" not in str(exit.value.code)
        return exit.value.code.removeprefix("error: ")

    return error_line


@pytest.fixture
def refused(error_line, arguments, tmp_path) -> Callable[..., str]:
    """The error line; asserts that nothing was compiled or written before it."""

    def refused(out: Path | None = None, **changes) -> str:
        before, out = len(COMPILED), out or tmp_path / "out"
        content = sorted(path.name for path in out.iterdir()) if out.is_dir() else None
        message = error_line(arguments(out, **changes))
        assert len(COMPILED) == before
        assert (sorted(path.name for path in out.iterdir()) if out.is_dir() else None) == content
        return message

    return refused


def test_nan_loss(arguments, error_line, tmp_path):
    out = tmp_path / "run"
    message = error_line(
        arguments(out, steps=9, save_every=1, optimizer=OptimizerConfig(peak=1e30))
    )
    assert (
        message == "step 1: gradient_norm is nan, loss is nan; "
        f"the batch was saved as {out}/bad-batch-1-0.npz"
    )
    batch = np.load(out / "bad-batch-1-0.npz")
    assert {name: batch[name].shape for name in batch} == {
        "tokens": (1, 3, 64),
        "targets": (1, 3, 64),
    }
    assert list(reported(out)) == [0] and not (out / "final").exists()
    assert [path.name for path in (out / "steps").iterdir()] == ["1"]  # the last good one, whole


def test_bad_checkpoints(refused, checkpoint_dir, tmp_path):
    assert (
        refused(checkpoint="")
        == "checkpoint is not given; set it in the config, or with --set checkpoint=PATH"
    )
    assert (
        refused(checkpoint="gone") == "gone is not an omni2-jax checkpoint: it has no config.json"
    )
    bad = linked(checkpoint_dir, tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    config["speech_lm"]["hidden"] //= 2
    replace(bad / "config.json", json.dumps(config))
    message = refused(checkpoint=str(bad))
    assert message.startswith(
        f"{bad}/params/speech_lm does not fit the checkpoint's configuration: "
    )
    assert "layers.mlp.up.kernel has shape [2, 48, 96], expected [2, 48, 48]" in message
    shutil.rmtree(bad / "params" / "speech_lm")
    assert (
        refused(checkpoint=str(bad))
        == f"{bad} lacks speech_lm, which stage 1b needs; omni2 convert adds parts to a checkpoint"
    )
    assert refused(reset=("llm",)) == "reset llm: stage 1b trains speech_lm only"
    inside = refused(checkpoint_dir / "run")
    assert (
        inside == f"{checkpoint_dir}/run lies within the checkpoint {checkpoint_dir}; "
        "give a directory outside of it"
    )


def test_bad_data(refused, talks, tmp_path):
    assert refused(data="") == "data is not given; set it in the config, or with --set data=PATH"
    assert (
        refused(data="gone")
        == "gone is no data set: it has no dataset.json; make one with omni2 prepare"
    )
    for key in ("data", "validation"):
        assert refused(**{key: str(tmp_path)}).startswith(
            f"{tmp_path} is no data set: it has no dataset.json"
        )
    empty = shutil.copytree(talks, tmp_path / "empty")
    (empty / "dataset.json").write_text('{"version": 1, "dialogues": 0}')
    assert refused(data=str(empty)) == f"{empty} is empty: it holds no dialogue"
    with Writer(tmp_path / "bare") as writer:
        writer.add(Dialogue("x", (Turn("user", "hi"), Turn("assistant", "no"))))
    needs = "has nothing to train stage 1b on: 1 x dialogue 0: a reply has no units; omni2 prepare"
    assert refused(data=str(tmp_path / "bare")).startswith(f"{tmp_path}/bare {needs}")
    assert (
        "2 x dialogue 0: too long for every bucket (0 segments, 0 positions, 51 tokens)"
        in refused(buckets=(Bucket(0, 0, 8),))
    )


def test_bad_mesh(refused):
    assert refused(mesh={"fsdp": 3}).startswith(
        "mesh 1 x 3 x 1 (replica x fsdp x tensor) does not fit the 1 devices there are; "
    )


def test_several_processes_without_distributed(arguments, error_line, tmp_path):
    message = error_line([*arguments(tmp_path / "run"), "--process", "0"])
    assert message.endswith("are for several processes; add --distributed")


def test_bad_out(refused, arguments, error_line, toy, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("content")
    for out in (tmp_path / "other", tmp_path / "other" / "file"):
        assert refused(out) == f"{out} exists and is not a run; give a new directory"
    out = tmp_path / "busy"
    with saved_states.locked(out):
        assert refused(out) == f"{out} is in use by another omni2 train"
    out = tmp_path / "run"
    saved_states.write_metadata(out, Run(toy(), out, jax.devices()[:1]).metadata)
    again = "give another --out, or the same settings"
    assert (
        refused(out, optimizer=OptimizerConfig(peak=1e-3))
        == f"{out} holds a run with another optimizer.peak; {again}"
    )
    assert refused(out, steps=4, seed=1) == f"{out} holds a run with another steps, seed; {again}"
    (out / "run.json").write_text("{}")
    assert "holds a run with another stage, " in refused(out)

"""Training runs: killed at any moment, they resume bit for bit; what they report and keep."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni2_jax import sharding
from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.configs import stage1a, stage2
from omni2_jax.generate.omni2 import Answer, Omni2, Options
from omni2_jax.models.layers import LORA_SCALE
from omni2_jax.train import sampler, step, weights
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.loader import Source
from omni2_jax.train.data.records import encode_clip
from omni2_jax.train.loop import Run
from omni2_jax.train.reporter import Reporter
from omni2_jax.train.settings import Bucket, MeshConfig, OptimizerConfig, TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.validator import Validator
from tests.support import xla
from tests.support.compare import tree_equal
from tests.support.paths import ROOT
from tests.support.releases import linked
from tests.support.runs import reported, toy_config


def run(train: TrainConfig, out: Path) -> Run:
    """Train on one device, however many there are."""
    run = Run(train, out, jax.devices()[:1])
    run.go()
    return run


def state(run: Path, step: int) -> dict:
    """The saved state after a step."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore((run / "steps" / str(step) / "default").absolute())


def part(directory: Path, name: str) -> dict[str, np.ndarray]:
    return {path: leaf.read() for path, leaf in parameters.stored(directory, name).items()}


# --- interrupted and resumed


def start(arguments: list[str]) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": xla.flags(1)}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, code: int) -> str:
    """The last line of a process that has to end with this code."""
    output = process.communicate(timeout=120)[1]
    assert process.returncode == code, output
    return output.splitlines()[-1]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_interrupted_and_resumed(toy, arguments, tmp_path, capsys):
    """Killed, then stopped by SIGTERM, then finished: every step is reported once, and all numbers
    are those of an uninterrupted run.

    The two interruptions are those of processes. The rest runs here, which is quicker.
    """
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    length = {"steps": 60, "save_every": 5}
    run(toy(**length), straight)

    process = start(arguments(cut, **length))
    wait_for(lambda: (cut / "steps" / "10").exists() and lines(cut) > 12, process)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and not (cut / "final").exists()
    # As if it had been killed while it wrote a line, a state and the last checkpoint.
    reached, saved = lines(cut), max(int(path.name) for path in (cut / "steps").glob("*[0-9]"))
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')
    shutil.copytree(
        cut / "steps" / str(saved),
        cut / "steps" / f"{saved + 5}.orbax-checkpoint-tmp",
        dirs_exist_ok=True,
    )
    (cut / "final.partial").mkdir()

    process = start(arguments(cut, **length))
    wait_for(lambda: lines(cut) > reached + 5, process)
    process.terminate()
    last_line = ended(process, 130)
    stopped = lines(cut)
    assert last_line == f"stopped at step {stopped} of 60; the same command resumes it"
    assert (
        saved < stopped < 60
        and (cut / "steps" / str(stopped)).exists()
        and not (cut / "final").exists()
    )

    capsys.readouterr()
    run(toy(**length), cut)
    done = f"done: {cut}/final is a checkpoint with speech_lm"
    assert capsys.readouterr().err.splitlines()[-1].startswith(done)
    for name in ("loss", "gradient_norm", "rate"):
        assert list(reported(cut, name)) == list(range(60))
        assert reported(cut, name) == reported(straight, name)
    assert tree_equal(state(cut, 60), state(straight, 60))
    assert tree_equal(part(cut / "final", "speech_lm"), part(straight / "final", "speech_lm"))
    assert {path.name for path in cut.iterdir()} == {
        ".lock",
        "run.json",
        "left-out.txt",
        "metrics.jsonl",
        "tensorboard",
        "steps",
        "final",
    }
    assert {path.name for path in (cut / "steps").iterdir()} == {"55", "60"}
    assert list((cut / "tensorboard").glob("events*"))


@pytest.fixture
def validated(monkeypatch) -> list[int]:
    """The steps after which a run validates; nothing is computed in a step or in a validation."""
    steps: list[int] = []

    class Fake:
        def run(self, params: weights.Params, done: int, reporter: Reporter) -> None:
            steps.append(done)
            assert reporter.metrics is not None
            reporter.metrics.write(done - 1, {"validation_loss": 1.0})

    monkeypatch.setattr(step, "compile_step", traced_only)
    monkeypatch.setattr(Run, "validator", lambda _: Fake())
    return steps


def test_stopped_when_a_validation_is_due(toy, arguments, omni2, validated, tmp_path, monkeypatch):
    """The state is saved and not validated; the resumed run validates it first.

    The exit code tells a recipe not to go on.
    """
    out, settings = tmp_path / "run", {"batch": 8, "validate_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", lambda _, done: done == 2)
        code, _, stderr = omni2("train", *arguments(out, **settings))
    assert code == 130 and "stopped at step 2 of 3; the same command resumes it" in stderr
    assert validated == [1] and (out / "steps" / "2").exists() and not (out / "final").exists()
    for _ in range(2):  # the second time nothing is left to do
        run(toy(**settings), out)
        assert validated == [1, 2, 3] and list(reported(out, "validation_loss")) == [0, 1, 2]


def test_the_last_step_is_validated(toy, validated, tmp_path):
    """Whatever `validate_every` is; also by the next run, if it was killed before that."""
    out, settings = tmp_path / "run", {"batch": 8, "validate_every": 2}
    run(toy(**settings), out)
    assert validated == [2, 3]
    metrics = out / "metrics.jsonl"
    *lines, last = metrics.read_text().splitlines(keepends=True)
    assert "validation_loss" in last
    metrics.write_text("".join(lines))
    run(toy(**settings), out)
    assert validated == [2, 3, 3] and list(reported(out, "validation_loss")) == [1, 2]


@pytest.fixture(scope="module")
def ended_run(toy, tmp_path_factory) -> Path:
    """Three steps, saved after the second and the last."""
    out = tmp_path_factory.mktemp("ended") / "run"
    run(toy(save_every=2), out)
    return out


def test_a_run_that_has_ended(toy, ended_run, tmp_path, monkeypatch):
    """It takes no further step, and exports the same checkpoint again if that is missing."""
    out = shutil.copytree(ended_run, tmp_path / "run")
    reports, exported = (out / "metrics.jsonl").read_bytes(), part(out / "final", "speech_lm")
    shutil.rmtree(out / "final")
    monkeypatch.setattr(step, "compile_step", lambda *_: None)
    run(toy(save_every=2), out)
    assert (out / "metrics.jsonl").read_bytes() == reports
    assert tree_equal(part(out / "final", "speech_lm"), exported)


def test_saved_states_that_cannot_be_read(toy, ended_run, tmp_path):
    out = shutil.copytree(ended_run, tmp_path / "run")
    (out / "steps" / "3" / "default" / "_METADATA").write_text("{")
    with pytest.raises(
        ValueError,
        match=rf"^{out}/steps/3 cannot be restored, is it damaged or of another run\? [^\n]*$",
    ):
        run(toy(save_every=2), out)


# --- the same numbers, however they are computed


@pytest.mark.nightly  # tests/test_training_mesh.py moves a run from one device to eight
def test_from_six_devices_to_one(toy, tmp_path):
    """A state saved by six devices (width in three, hidden size in two) is resumed by one.

    The parameters are compared as well as the losses.
    """
    out, settings = tmp_path / "run", toy(save_every=2)
    # The biases of keys hardly change a softmax. Their gradients are close to rounding errors,
    # which Adam with a smaller eps scales up to full steps.
    settings = dataclasses.replace(
        settings, optimizer=dataclasses.replace(settings.optimizer, eps=1e-4)
    )
    Run(
        dataclasses.replace(settings, mesh=MeshConfig(fsdp=3, tensor=2)), out, jax.devices()[:6]
    ).go()
    losses, expected = reported(out), state(out, 3)["params"]
    shutil.rmtree(out / "steps" / "3")
    run(settings, out)
    assert reported(out) == pytest.approx(losses, rel=1e-5)
    for path, value in state(out, 3)["params"].items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6)


@pytest.fixture
def computed(toy) -> Callable[..., tuple]:
    """Loss, terms and gradients of the first batch."""

    def computed(**changes) -> tuple:
        run = Run(toy(**changes), Path("nowhere"), jax.devices()[:1])
        loaded, trained, frozen = weights.load(run.stage, run.start, run.mesh)
        batch, _ = next(run.data.loader.start(0))
        gradients = jax.jit(run.stage.objective(loaded, run.steps).gradients)
        return jax.device_get(gradients(trained, frozen, batch, jax.random.key(0)))

    return computed


@pytest.mark.slow
def test_microbatches_and_remat(computed):
    loss, terms, grads = computed()
    assert terms > 100 and all(np.abs(grad).max() > 0 for grad in grads.values())
    for changes in ({"microbatches": 3, "remat": "none"}, {"remat": "dots"}):
        ours = computed(**changes)
        np.testing.assert_allclose(ours[0], loss, rtol=1e-6)
        assert ours[1] == terms
        for path, grad in grads.items():
            assert np.linalg.norm(ours[2][path] - grad) < 1e-5 * np.linalg.norm(grad), (
                changes,
                path,
            )


# --- what it leaves


@pytest.fixture(scope="module")
def low_rank(toy, tmp_path_factory) -> Run:
    """Stage 1a with a rank and an average of the weights.

    One dialogue fits into the bucket. 7 epochs of it fill 4 batches of 2 rows but for the last row.
    """
    optimizer = OptimizerConfig(peak=5e-3, ema=0.5)
    short = {
        "buckets": (Bucket(1, 400),),
        "batch": 2,
        "steps": None,
        "epochs": 7,
        "save_every": 1,
        "keep": 4,
    }
    return run(
        toy(stage1a.config, rank=4, optimizer=optimizer, **short),
        tmp_path_factory.mktemp("low_rank") / "run",
    )


@pytest.mark.slow
def test_low_rank_updates(low_rank, checkpoint_dir):
    """The LLM's kernels do not change while the updates are trained; the export merges them."""
    losses = list(reported(low_rank.out).values())
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    final = low_rank.out / "final"
    before, after, trained = (
        part(checkpoint_dir, "llm"),
        part(final, "llm"),
        state(low_rank.out, 4)["ema"],
    )
    assert {path.rpartition(".")[2] for path in trained if path.startswith("llm.")} == {
        "low",
        "high",
    }
    for path, leaf in before.items():
        np.testing.assert_array_equal(low_rank.frozen[f"llm.{path}"], leaf)
        stem = path.removesuffix("kernel")
        if f"llm.{stem}low" in trained:
            pairs = zip(
                trained[f"llm.{stem}low"], trained[f"llm.{stem}high"], strict=True
            )  # of every layer
            leaf = leaf + LORA_SCALE * np.stack([np.tensordot(low, high, 1) for low, high in pairs])
            assert np.abs(leaf - before[path]).max() > 1e-4
        np.testing.assert_allclose(after[path], leaf, atol=1e-6)
    assert (
        after.keys() == before.keys()
        and Omni2.load(final, jnp.float32, decoder=False).config.llm.rank == 0
    )


@pytest.mark.slow
def test_average_of_the_weights(low_rank, checkpoint_dir):
    """The exported weights are the average, computed here from the states of all steps."""
    average = part(checkpoint_dir, "adapter")
    for number in (1, 2, 3, 4):
        saved = state(low_rank.out, number)
        assert saved["step"] == number
        average = {
            path: 0.5 * old + 0.5 * saved["params"][f"adapter.{path}"]
            for path, old in average.items()
        }
    for path, value in part(low_rank.out / "final", "adapter").items():
        np.testing.assert_allclose(value, average[path], atol=1e-6)
        assert np.abs(value - saved["params"][f"adapter.{path}"]).max() > 1e-4


def test_exported_low_rank_updates(new_checkpoint, talks, tmp_path):
    """What is computed in bfloat16 and not trained is exported as it is stored, in float32."""
    stage = stage_of(toy_config(stage1a.config, new_checkpoint, talks, rank=4, dtype="bfloat16"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, trained, frozen = weights.load(stage, new_checkpoint, mesh)
    trained = {path: leaf + 0.1 for path, leaf in trained.items()}
    weights.export(stage, new_checkpoint, trained, frozen, tmp_path / "final")
    for name in ("adapter", "llm"):
        after = part(tmp_path / "final", name)
        for path, leaf in part(new_checkpoint, name).items():
            stem, tolerance = f"{name}.{path.removesuffix('kernel')}", 0.0
            if name == "adapter":
                leaf = leaf + np.float32(0.1)
            elif f"{stem}low" in trained:
                pairs = zip(trained[f"{stem}low"], trained[f"{stem}high"], strict=True)
                leaf = leaf + LORA_SCALE * np.stack([np.tensordot(*pair, 1) for pair in pairs])
                tolerance = 1e-6
            np.testing.assert_allclose(after[path], leaf, rtol=0, atol=tolerance)
            assert after[path].dtype == np.float32


def traced_only(objective: step.Objective, shardings) -> Callable:
    """A step that is traced but not compiled: it returns the state unchanged, and zeros."""

    def take_step(state, frozen, batch, phase):
        def step(*inputs):
            return objective.step(*inputs, phase)

        _, metrics = jax.eval_shape(step, state, frozen, batch)
        return state, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), metrics)

    return take_step


@pytest.mark.parametrize("mix, reset", [("sum", ("speech_lm",)), ("hidden", ())])
def test_ablations_of_gate_fusion(toy, checkpoint_dir, tmp_path, monkeypatch, mix, reset):
    """They start from a checkpoint with a gate; the export states the ablation in its config."""
    monkeypatch.setattr(step, "compile_step", traced_only)
    out = tmp_path / "run"
    run(
        toy(stage2.config, mix=mix, reset=reset, buckets=(Bucket(1, 400, 64),), batch=2, steps=1),
        out,
    )
    assert Omni2.load(out / "final", jnp.float32, decoder=False).config.mix == mix
    before, after = (part(directory, "fusion") for directory in (checkpoint_dir, out / "final"))
    assert after.keys() == {path for path in before if not path.startswith("gate.")}
    assert not any(
        np.array_equal(leaf, before[path])
        for path, leaf in after.items()
        if path.endswith("kernel")
    )
    before, after = (part(directory, "speech_lm") for directory in (checkpoint_dir, out / "final"))
    assert tree_equal(before, after) == (not reset)


@pytest.mark.slow
def test_validation_and_samples(toy, checkpoint_dir, talks, tmp_path, monkeypatch):
    """The loss of the validation data, and answers in text and units from a checkpoint without a
    decoder.
    """
    monkeypatch.setattr(sampler, "FLUSH_UNITS", 30)
    silent = linked(checkpoint_dir, tmp_path / "silent")
    for name in ("flow", "vocoder"):
        shutil.rmtree(silent / "params" / name)
    out = tmp_path / "run"
    run(
        toy(checkpoint=str(silent), validation=str(talks), validate_every=2, max_sample_text=6), out
    )
    measured = reported(out, "validation_loss")
    # Every batch holds all of the data, so the validation loss is that of the next training step.
    assert list(measured) == [1, 2] and measured[1] == pytest.approx(reported(out)[2], rel=1e-5)
    folder, data = out / "samples" / "2", Dataset(talks)
    assert {path.name for path in folder.iterdir()} == {"0.txt", "1.txt"}
    for index in range(2):
        question, _, units = (folder / f"{index}.txt").read_text().split("\n")[:3]
        assert question == data.dialogue(index).turns[0].text
        assert re.fullmatch(r"(<\d+>)+", units)


def test_spoken_samples(toy, talks, tmp_path, monkeypatch):
    """With a decoder and a voice there is also a sound file.

    `Omni2.answer` is replaced: test_omni2.py tests it, and it takes long to compile.
    """
    questions = []

    def answer(model: Omni2, question: np.ndarray, options: Options) -> Answer:
        assert {"speech_lm", "flow", "vocoder"} <= model.params.keys() and model.voice(
            None
        ).size == 192
        questions.append(question)
        return Answer("Blue.", [1, 2], "<1><2>", np.linspace(-0.5, 0.5, 1920, dtype=np.float32))

    monkeypatch.setattr(Omni2, "answer", answer)
    # The second question cannot be read; the run goes on.
    damaged, data = shutil.copytree(talks, tmp_path / "damaged"), Dataset(talks)
    file = min(damaged.glob("clips-*"))
    second = encode_clip(data.clip(data.dialogue(1).turns[0].clip), recordings.INPUT_RATE)
    file.write_bytes(file.read_bytes().replace(second[-100:], b"damaged" + second[-93:]))
    out = tmp_path / "run"
    run(toy(validation=str(damaged), validate_every=2, steps=2), out)
    folder = out / "samples" / "2"
    assert {path.name for path in folder.iterdir()} == {"0.txt", "0.wav"}
    np.testing.assert_array_equal(questions, [data.clip(data.dialogue(0).turns[0].clip)])
    assert (folder / "0.txt").read_text() == "What color is the sea?\nBlue.\n<1><2>\n"
    np.testing.assert_allclose(
        recordings.load(folder / "0.wav", recordings.OUTPUT_RATE),
        np.linspace(-0.5, 0.5, 1920),
        atol=1e-4,
    )


@pytest.mark.slow
def test_examples_that_are_left_out(toy, talks, tmp_path, monkeypatch, capsys):
    """Examples without a bucket are listed at the start, damaged records when they are read."""
    with monkeypatch.context() as patch:
        patch.setattr(step, "compile_step", traced_only)
        run(toy(stage1a.config, buckets=(Bucket(1, 400),), batch=1, steps=1), tmp_path / "short")
    left_out = "dialogue 1: too long for every bucket (2 segments, 724 positions, 0 tokens)\n"
    assert (tmp_path / "short" / "left-out.txt").read_text() == left_out
    damaged, out = shutil.copytree(talks, tmp_path / "damaged"), tmp_path / "run"
    file = min(damaged.glob("dialogues-*"))
    file.write_bytes(file.read_bytes().replace(b"With milk?", b"With mould"))
    validated = {"validation": str(talks), "validate_every": 1, "samples": 0}
    resumed = Run(toy(**validated), out, jax.devices()[:1])
    assert resumed.validation is not None
    resumed.data.examples.data = resumed.validation.examples.data = Dataset(damaged)
    resumed.go()
    assert (
        reported(out, "damaged") == {0: 1, 1: 1, 2: 1} and (out / "left-out.txt").read_text() == ""
    )
    notes = re.findall(f"{damaged}: dialogue 1 is damaged: .*; (.*)", capsys.readouterr().err)
    assert sorted(notes) == ["left out", "left out of the validation"]


def test_each_process_prints_the_damage_that_it_meets(tmp_path, monkeypatch, capsys):
    """Of several processes, another one than the first."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stage = SimpleNamespace(train=TrainConfig("1b"), report=lambda sums: {})
    source = Source(None, None, [], slice(0, 1))
    loader = SimpleNamespace(source=source, start=lambda step: iter([]))
    split = SimpleNamespace(batches=[], loader=loader)
    reporter = Reporter(stage, tmp_path, split, None, 0)
    source.damaged[3] = "clip 6 is damaged"
    assert (reporter.report_damaged(), reporter.report_damaged()) == (1, 1)
    assert capsys.readouterr().err == "clip 6 is damaged; left out\n"
    validator = Validator.__new__(Validator)
    validator.stage, validator.split, validator.sampler = stage, split, None
    source.damaged[4] = "clip 8 is damaged"
    validator.run({}, 1, reporter)
    assert capsys.readouterr().err == "clip 8 is damaged; left out of the validation\n"


@pytest.mark.slow
def test_traced_steps(toy, ended_run, tmp_path):
    """Also if the first of them lies before the resumed step, or the last after the run's end."""
    out = shutil.copytree(ended_run, tmp_path / "run")
    shutil.rmtree(out / "steps" / "3")
    run(toy(save_every=2, profile=(1, 9)), out)
    assert list((out / "profile").rglob("*.xplane.pb"))

"""Stage "vocoder": it learns in all of its phases, and resumes bit for bit from each of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from omni2_jax.audio import pitch, recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.config import HiftConfig, Omni2Config
from omni2_jax.models.vocoder import build
from omni2_jax.train import f0_targets
from omni2_jax.train.data import prepare
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig, VocoderTraining
from tests.support.compare import tree_equal
from tests.support.runs import reported, saved_state, train

# Two stages and one small block: quick to compile.
SMALL = HiftConfig(
    channels=16,
    f0_channels=8,
    upsample=(8, 15),
    upsample_kernels=(16, 31),
    resblock_kernels=(3,),
    resblock_dilations=((1,),),
    source_kernels=(3, 3),
    source_dilations=((1,), (1,)),
)
F0_STEPS, GAN_FROM, STEPS = 100, 205, 220
# Steps after which a run is cut: in the last phase, and in the first.
CUTS = (210, pytest.param(60, marks=pytest.mark.nightly))


@pytest.fixture(scope="module")
def start(checkpoint_dir, tmp_path_factory) -> Path:
    """The tiny release with a small vocoder of fresh parameters."""
    out = shutil.copytree(checkpoint_dir, tmp_path_factory.mktemp("start") / "ckpt")
    leaves = parameters.flatten(nnx.to_pure_dict(nnx.split(build(SMALL, nnx.Rngs(0)))[1]))
    shutil.rmtree(out / "params" / "vocoder")
    parameters.save_part(out, "vocoder", leaves)
    Omni2Config.load(out / "config.json").replace(vocoder=SMALL).save(out / "config.json")
    return out


@pytest.fixture(scope="module")
def settings(start, talks) -> TrainConfig:
    return TrainConfig(
        stage="vocoder",
        checkpoint=str(start),
        data=str(talks),
        validation=str(talks),
        batch=3,
        steps=STEPS,
        optimizer=OptimizerConfig(peak=1e-2, beta1=0.8, ema=0.9, warmup=0.05),
        buckets=(Bucket(0, 0, 64),),
        vocoder=VocoderTraining(
            segment=15,
            harmonic_phases=20.0,
            f0_steps=F0_STEPS,
            gan_from=GAN_FROM,
            f0_peak=5e-3,
            gan_peak=2e-3,
            width=2,
            periods=(2,),
            resolutions=(256,),
        ),
        dtype="float32",
        workers=1,
        save_every=10,
        keep=99,
        validate_every=60,
    )


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    return train(settings, tmp_path_factory.mktemp("runs") / "straight")


@pytest.mark.slow
def test_every_loss_falls(trained):
    """In the F0 predictor's phase its error to half; then the mel's to half of the first."""
    alone = list(reported(trained).values())[:F0_STEPS]
    assert np.mean(alone[-10:]) < np.mean(alone[:10]) / 2
    mels = list(reported(trained, "mel_loss").values())
    assert list(reported(trained, "mel_loss")) == list(range(F0_STEPS, STEPS))
    assert np.mean(mels[-10:]) < np.mean(mels[:5]) / 2
    phases = list(reported(trained, "harmonic_phases_loss").values())
    assert np.mean(phases[-10:]) < 0.9 * np.mean(phases[:10])
    validated = list(reported(trained, "validation_loss").values())
    assert validated[-1] < validated[0] / 2
    judged = list(reported(trained, "discriminator_loss").values())
    assert len(judged) == STEPS - GAN_FROM and np.mean(judged[-3:]) < judged[0]


@pytest.mark.slow
def test_groups_change_in_their_phases_only(trained):
    """The F0 predictor alone, then the vocoder too, the discriminators in the last phase."""
    by_phase = [saved_state(trained, step)["params"] for step in (10, F0_STEPS, 160, STEPS)]
    for (before, after), changing in zip(
        ((by_phase[i], by_phase[i + 1]) for i in range(3)),
        ({"f0"}, {"f0", "vocoder"}, {"f0", "vocoder", "discriminators"}),
        strict=True,
    ):
        assert {name for name in before if not tree_equal(before[name], after[name])} == changing


@pytest.mark.slow
def test_learning_rates(trained):
    """The vocoder's falls until the discriminators begin, and then to zero from `gan_peak` on."""
    rates = reported(trained, "vocoder_rate")
    assert max(rates.values()) == pytest.approx(1e-2)
    late = [rates[step] for step in range(GAN_FROM, STEPS)]
    assert max(late) == pytest.approx(2e-3)
    assert late[-1] < 2e-4 and rates[GAN_FROM - 1] < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("step", CUTS)
def test_resumed(settings, trained, tmp_path, step):
    """Killed after a step, it ends with the same state of all optimizers, to the bit."""
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut, ignore=shutil.ignore_patterns("final"))
    for path in (cut / "steps").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    train(settings, cut)
    assert tree_equal(saved_state(cut, STEPS), saved_state(trained, STEPS))
    assert reported(cut) == reported(trained)


@pytest.mark.slow
def test_the_export(start, trained):
    """The averaged vocoder and nothing else: other parts are the same files, no discriminators."""
    final = trained / "final"
    assert parameters.parts(final) == parameters.parts(start)
    for part in parameters.parts(start):
        before, after = (
            {path: leaf.read() for path, leaf in parameters.stored(directory, part).items()}
            for directory in (start, final)
        )
        assert tree_equal(before, after) == (part != "vocoder")
    exported = {path: leaf.read() for path, leaf in parameters.stored(final, "vocoder").items()}
    average = saved_state(trained, STEPS)["ema"]
    assert all(np.array_equal(exported[path.partition(".")[2]], average[path]) for path in average)


# ---- F0 targets ----


def test_f0_targets_are_kept(talks, tmp_path, monkeypatch):
    """Computed once; a file that is damaged or of other data is made again."""
    folder = shutil.copytree(talks, tmp_path / "data")
    data = Dataset(folder)
    replies = [reply for i in range(len(data)) for reply in data.dialogue(i).replies.values()]
    targets = f0_targets.of_dataset(data)
    for reply in replies:
        np.testing.assert_array_equal(targets.clip(reply.clip), pitch.f0(data.clip(reply.clip)))
    stored = (folder / f0_targets.FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pitch, "f0", None)
        assert tree_equal(vars(f0_targets.of_dataset(data)), vars(targets))
    for damaged in (b"", stored[: len(stored) // 2], b"PK" + stored[5:]):
        (folder / f0_targets.FILE).write_bytes(damaged)
        assert tree_equal(vars(f0_targets.of_dataset(data)), vars(targets))
        assert (folder / f0_targets.FILE).read_bytes() == stored


# ---- bad input ----


def refused(settings: TrainConfig, out: Path, **changes) -> str:
    """What a run that cannot be made says; it compiles and writes nothing."""
    with pytest.raises(ValueError) as error:
        Run(dataclasses.replace(settings, **changes), out)
    assert "\n" not in str(error.value) and not out.exists()
    return str(error.value)


def test_bad_input(settings, tmp_path, checkpoint_dir):
    random = np.random.default_rng(0)
    for name, samples in {"noise": 0.1 * random.standard_normal(48000), "short": 3000}.items():
        folder = tmp_path / name
        folder.mkdir()
        recordings.save(
            folder / "a.wav", np.full(samples, 0.1) if name == "short" else samples, 24000
        )
        line = {"audio": "a.wav", "text": "Hm."}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        prepare.prepare(folder, folder / "data")

    def message(name: str) -> str:
        return refused(settings, tmp_path / "run", data=str(tmp_path / name / "data"))

    assert "has nothing to train stage vocoder on" in message("noise")
    assert "turn 0 has no voice in its recording" in message("noise")
    assert (
        "its recording is shorter than the setting vocoder.segment (6 of 15 mel frames)"
        in message("short")
    )
    assert "microbatches is 3, expected 1 for stage vocoder" in (
        refused(settings, tmp_path / "run", microbatches=3)
    )
    segment = dataclasses.replace(settings.vocoder, segment=4)
    assert (
        "vocoder.segment is 4, expected at least 5: the longest spectrum is of 2048 samples"
        in refused(settings, tmp_path / "run", vocoder=segment)
    )

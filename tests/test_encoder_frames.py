"""The speech encoder's frames on disk: a run that reads them learns as one that computes them."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.configs import stage1a, stage1b, stage2
from omni2_jax.train import compute_frames
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.records import encode_clip
from omni2_jax.train.encoder_frames import EncoderFrames, origin
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, TrainConfig
from tests.support.runs import toy_config

BUCKETS = (Bucket(6, 300),)  # a question of 2 s takes one window, a longer one several


@pytest.fixture(scope="module")
def settings(new_checkpoint, talks):
    def settings(**changes) -> TrainConfig:
        sizes = {"batch": 2, "steps": 3, "buckets": BUCKETS}
        return toy_config(stage1a.config, new_checkpoint, talks, **(sizes | changes))

    return settings


@pytest.fixture(scope="module")
def frames(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("frames") / "frames"
    of_training_alone = {"replay": 0.4, "ctc": 0.3, "ctc_steps": 1}
    compute_frames.compute(settings(batch=1, **of_training_alone), out, jax.devices()[:1])
    return out


def losses(train: TrainConfig, out: Path) -> list[float]:
    Run(train, out, jax.devices()[:1]).go()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_a_run_that_reads_them_has_the_same_losses(settings, frames, new_checkpoint, tmp_path):
    """They are rounded to float16, so not to the bit."""
    computed = losses(settings(), tmp_path / "computed")
    read = losses(settings(frames=str(frames)), tmp_path / "read")
    np.testing.assert_allclose(read, computed, rtol=1e-4)
    assert len(set(read)) == 3
    for part in ("speech_encoder", "flow"):  # frozen, and not loaded
        start = parameters.fingerprint(new_checkpoint, part)
        assert parameters.fingerprint(tmp_path / "read" / "final", part) == start


def test_they_belong_to_data_encoder_and_window(settings, frames, new_checkpoint, talks, tmp_path):
    config, data = Omni2Config.load(new_checkpoint / "config.json"), Dataset(talks)
    train = settings(frames=str(frames))
    stored = EncoderFrames.of(train, config, data, "data")
    assert stored and stored.width == 16 and stored.read(0, 100).dtype == np.float16
    wrong = [("window", 99), ("encoder", "0123456789abcdef")]
    for name, value in wrong:
        with pytest.raises(ValueError, match="or by another speech encoder, or for another window"):
            EncoderFrames(frames / "data", data, 16, **origin(train, config) | {name: value})
    other = shutil.copytree(new_checkpoint, tmp_path / "other")
    before = parameters.fingerprint(other, "speech_encoder")
    leaves = {
        path: leaf.read() for path, leaf in parameters.stored(other, "speech_encoder").items()
    }
    leaves["conv1.bias"] = leaves["conv1.bias"] + 1
    shutil.rmtree(other / "params" / "speech_encoder")
    parameters.save_part(other, "speech_encoder", leaves)
    assert parameters.fingerprint(other, "speech_encoder") != before
    with pytest.raises(
        ValueError, match=f"{frames}/data was made from other data than {talks}, or"
    ):
        Run(settings(frames=str(frames), checkpoint=str(other)), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no encoder frames; omni2 frames computes them"):
        Run(settings(frames=str(tmp_path)), tmp_path / "run")


def test_a_damaged_recording_has_none(settings, talks, tmp_path, capsys):
    damaged, data = shutil.copytree(talks, tmp_path / "damaged"), Dataset(talks)
    file = min(damaged.glob("clips-*"))
    clip = encode_clip(data.clip(data.dialogue(1).turns[0].clip), recordings.INPUT_RATE)
    file.write_bytes(file.read_bytes().replace(clip[-100:], b"damaged" + clip[-93:]))
    train = settings(data=str(damaged), batch=1, frames=str(tmp_path / "frames"))
    compute_frames.compute(train, tmp_path / "frames", jax.devices()[:1])
    errors = capsys.readouterr().err
    assert len(re.findall(f"{damaged}: clip 2 is damaged: .*; left out\n", errors)) == 1
    config = Omni2Config.load(Path(train.checkpoint) / "config.json")
    stored = EncoderFrames.of(train, config, Dataset(damaged), "data")
    assert stored and [place is None for place in stored.places] == [False, True]
    with pytest.raises(RecordError, match="has no encoder frames of dialogue 1: omni2 frames left"):
        stored.read(1, 100)


def test_which_stages_read_them(new_checkpoint, talks, tmp_path):
    with pytest.raises(ValueError, match="a run of stage 1b reads no frames"):
        compute_frames.compute(toy_config(stage1b.config, new_checkpoint, talks), tmp_path / "out")
    with pytest.raises(ValueError, match="frames are not read with hidden; expected one of them"):
        toy_config(stage2.config, new_checkpoint, talks, frames="a", hidden="b")
    assert not (tmp_path / "out").exists()

"""Units of another speech tokenizer than the checkpoint's, or than those of the other data set."""

import dataclasses
import json
import re
import shutil

import jax
import pytest

from omni2_jax.configs import stage1a, stage1b
from omni2_jax.models import speech_tokenizer
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket
from omni2_jax.train.unit_origin import disagreement
from tests.support.releases import linked


@pytest.fixture
def made_by(talks, tmp_path):
    """A copy of a data set whose dataset.json tells of another tokenizer: (name, fingerprint)."""

    def made_by(name: str, fingerprint: str | None) -> Dataset:
        folder = shutil.copytree(talks, tmp_path / name)
        info = json.loads((folder / "dataset.json").read_text())
        info |= {"tokenizer": f"of-{name}", "fingerprint": fingerprint}
        (folder / "dataset.json").write_text(json.dumps(info))
        return Dataset(folder)

    return made_by


def test_data_sets(made_by, checkpoint_dir):
    """Units that a data set brought with it are compared with nothing."""
    data, same, other = made_by("data", "1a"), made_by("same", "1a"), made_by("other", "2b")
    unknown = made_by("unknown", None)
    assert disagreement(checkpoint_dir, {"data": data, "validation": same}) == ""
    assert disagreement(checkpoint_dir, {"data": data, "validation": unknown}) == ""
    assert re.fullmatch(
        r"the units may be of several speech tokenizers: data \(of-data\): 1a, "
        r"validation \(of-other\): 2b; unless [^\n]*",
        disagreement(checkpoint_dir, {"data": data, "validation": other}),
    )


def test_checkpoint(made_by, speech_tokenizer_dir):
    own = speech_tokenizer.fingerprint(speech_tokenizer.load(speech_tokenizer_dir))
    assert disagreement(speech_tokenizer_dir, {"data": made_by("same", own)}) == ""
    assert disagreement(speech_tokenizer_dir, {"data": made_by("unknown", None)}) == ""
    found = disagreement(speech_tokenizer_dir, {"data": made_by("other", "2b")})
    assert f"data (of-other): 2b, checkpoint ({speech_tokenizer_dir}): {own};" in found


def test_a_run_says_so(toy, made_by, tmp_path, monkeypatch, capsys):
    """Only that of a stage which reads units."""
    data, other = made_by("data", "1a"), made_by("other", "2b")
    monkeypatch.setattr(Run, "steps_from", lambda _, first, state, saved: (state, first))

    def said(config) -> str:
        paths = {"data": str(data.path), "validation": str(other.path)}
        Run(dataclasses.replace(config, **paths), tmp_path / config.stage, jax.devices()[:1]).go()
        return capsys.readouterr().err

    heard = toy(stage1a.config, buckets=(Bucket(2, 800),))
    assert "may be of several speech tokenizers" in said(toy(stage1b.config))
    assert "speech tokenizer" not in said(heard)


def test_a_tokenizer_that_cannot_be_read(
    toy, made_by, checkpoint_dir, speech_tokenizer_dir, tmp_path
):
    """The run is refused before anything is written."""
    start = linked(checkpoint_dir, tmp_path / "start")
    linked(speech_tokenizer_dir / "params/speech_tokenizer", start / "params/speech_tokenizer")
    (start / "speech_tokenizer.json").write_text("{")
    settings = toy(checkpoint=str(start), data=str(made_by("data", "1a").path))
    with pytest.raises(ValueError, match=r"speech_tokenizer\.json is not a .*: it is not JSON"):
        Run(settings, tmp_path / "run", jax.devices()[:1])
    assert not (tmp_path / "run").exists()

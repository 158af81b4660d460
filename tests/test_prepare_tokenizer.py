"""The speech tokenizer as a part of a checkpoint, for `omni2 prepare`."""

import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.cli.main import main
from omni2_jax.config import Omni2Config
from omni2_jax.convert import read, write
from omni2_jax.models import speech_tokenizer
from tests.support.networks import TINY_TOKENIZER as TINY
from tests.support.networks import TOKENIZER_CLIPS as CLIPS
from tests.support.networks import draw_tokenizer
from tests.support.paths import AUDIO, GOLDENS
from tests.support.preparing import content
from tests.support.releases import convert

WHISPER = GOLDENS / "whisper" / "tiny.pt"


def test_tokenizer_alone(speech_tokenizer_dir, capsys, monkeypatch):
    assert parameters.parts(speech_tokenizer_dir) == ["speech_tokenizer"]
    assert speech_tokenizer.load_config(speech_tokenizer_dir) == TINY
    assert Omni2Config.load(speech_tokenizer_dir / "config.json") == Omni2Config().only()
    wav, name = recordings.load(AUDIO / f"{CLIPS[0]}.wav"), CLIPS[0]
    net = speech_tokenizer.load(speech_tokenizer_dir)
    codes, _ = speech_tokenizer.tokenize(net, wav[None])
    np.testing.assert_array_equal(
        codes[0], np.load(GOLDENS / "s3tokenizer" / f"{name}.npz")["codes"]
    )
    before = speech_tokenizer.fingerprint(net)
    net.project.bias[...] += 1e-6
    assert (
        speech_tokenizer.fingerprint(net)
        != before
        == speech_tokenizer.fingerprint(speech_tokenizer.load(speech_tokenizer_dir))
    )
    monkeypatch.setattr(sys, "argv", ["omni2", "info", str(speech_tokenizer_dir)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "speech_tokenizer" in printed and "6561" in printed
    assert f"{sum(array.size for array in draw_tokenizer().values()):,}" in printed


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of something else, to be extended."""
    assert convert("--whisper", WHISPER, "--out", tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def test_tokenizer_joins_a_checkpoint(whole, speech_tokenizer_dir, speech_tokenizer_file):
    before = content(whole)
    assert convert("--speech-tokenizer", speech_tokenizer_file, "--out", whole) == 0
    after = content(whole)
    assert before.items() <= after.items()
    assert {path.parts[:2] for path in after.keys() - before.keys()} == {
        ("speech_tokenizer.json",),
        ("params", "speech_tokenizer"),
    }
    assert speech_tokenizer.fingerprint(
        speech_tokenizer.load(whole)
    ) == speech_tokenizer.fingerprint(speech_tokenizer.load(speech_tokenizer_dir))
    assert "has speech_tokenizer already" in convert(
        "--speech-tokenizer", speech_tokenizer_file, "--out", whole
    )
    assert content(whole) == after


def test_tokenizer_beside_other_sources(speech_tokenizer_dir, speech_tokenizer_file, tmp_path):
    """And other parts join a checkpoint of a tokenizer."""
    assert (
        convert(
            "--speech-tokenizer",
            speech_tokenizer_file,
            "--whisper",
            WHISPER,
            "--out",
            tmp_path / "both",
        )
        == 0
    )
    shutil.copytree(speech_tokenizer_dir, tmp_path / "later")
    assert convert("--whisper", WHISPER, "--out", tmp_path / "later") == 0
    for name in ("both", "later"):
        assert parameters.parts(tmp_path / name) == ["speech_encoder", "speech_tokenizer"]
        assert speech_tokenizer.load_config(tmp_path / name) == TINY


def test_a_tokenizer_that_is_none(whole, tmp_path):
    before = content(whole)
    state = draw_tokenizer()
    state["encoder.blocks.0.attn_ln.weight"] = state["encoder.blocks.0.attn_ln.weight"][:-1]
    save_file(state, tmp_path / "bad.safetensors")
    (tmp_path / "none.onnx").write_bytes(b"no onnx")
    for name, says in (
        ("bad.safetensors", "attn_ln.weight has shape [127], expected [128]"),
        ("none.onnx", "none.onnx"),
        ("gone", "exist"),
    ):
        for out in (whole, tmp_path / "new"):
            message = convert("--speech-tokenizer", tmp_path / name, "--out", out)
            assert message.startswith("error: ") and "\n" not in message and says in message
    assert content(whole) == before and not (tmp_path / "new").exists()


def test_a_cut_leaves_the_checkpoint_as_it_was(whole, speech_tokenizer_file, monkeypatch):
    before = content(whole)
    monkeypatch.setattr(write.Omni2Config, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write.extend(whole, read.read_speech_tokenizer(speech_tokenizer_file), {})
    assert content(whole) == before

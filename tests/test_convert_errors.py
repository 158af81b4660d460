"""Bad input to the converter: one line that names the file and the fault, and nothing is left."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import rich.progress
import torch
from etils import epath
from safetensors.numpy import load_file, save_file

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import Omni2Config
from omni2_jax.convert import cosyvoice, export, read, write
from omni2_jax.convert.plan import ConversionError, Rule, Table, plan
from omni2_jax.convert.release import combine
from tests.support.paths import GOLDENS
from tests.support.releases import convert, linked, replace

OMNI2, DECODER, WHISPER = (
    GOLDENS / "omni2",
    GOLDENS / "cosy2_decoder",
    GOLDENS / "whisper" / "tiny.pt",
)
WEIGHTS = OMNI2 / "model.safetensors"


def assert_refused(tmp_path, *args, says):
    """The command ends with one line with every text of `says` in it, and leaves no output."""
    out = tmp_path / "out" / "ckpt"
    message = convert(*args, "--out", out)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    for text in says:
        assert text in message, message
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def edited(path, **changes):
    """A json file's content with keys changed, or left out where None."""
    content = json.loads(path.read_text()) | changes
    return json.dumps({key: value for key, value in content.items() if value is not None})


def header(**changes):
    """The golden safetensors file with entries of its header changed, its data as it is."""
    content = WEIGHTS.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size]) | changes
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def scalar(**changes):
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


# ---- a LLaMA-Omni2 release ----

RELEASES = {
    "missing tokenizer": (
        "tokenizer.json vocab.json merges.txt",
        None,
        ["has no tokenizer", "tokenizer.json"],
    ),
    "missing speech tokenizer": (
        "tts_tokenizer/vocab.json",
        None,
        ["tts_tokenizer has no tokenizer"],
    ),
    "damaged tokenizer": ("tokenizer.json", '{"version": 3', ["is not a readable tokenizer"]),
    "no weights": ("model.safetensors", None, ["neither model.safetensors nor"]),
    "cut short": (
        "model.safetensors",
        WEIGHTS.read_bytes()[:3_000_000],
        ["model.safetensors is cut short", "3000000"],
    ),
    "cut in its header": (
        "model.safetensors",
        WEIGHTS.read_bytes()[:900],
        ["model.safetensors", "cut short"],
    ),
    "empty": ("model.safetensors", b"", ["model.safetensors", "cut short"]),
    "not safetensors": (
        "model.safetensors",
        b"PK\x03\x04" + bytes(5000),
        ["model.safetensors is no safetensors file", "67324752"],
    ),
    "a list for a header": (
        "model.safetensors",
        b"\x02" + bytes(7) + b"[]",
        ["model.safetensors", "holds a list"],
    ),
    "corrupt offsets": (
        "model.safetensors",
        header(x=scalar(data_offsets=[0, 9])),
        ["model.safetensors is corrupt", "'data_offsets': [0, 9]"],
    ),
    "corrupt entry": (
        "model.safetensors",
        header(x=7),
        ["model.safetensors is corrupt", "describes x as 7"],
    ),
    "unknown type": (
        "model.safetensors",
        header(x=scalar(dtype="F4")),
        ["model.safetensors", "none of F32", "F4"],
    ),
    "no config": ("config.json", None, ["has no config.json"]),
    "damaged config": ("config.json", "{", ["cannot read", "config.json"]),
    "a list for a config": ("config.json", "[]", ["config.json holds a list"]),
    "another model": (
        "config.json",
        edited(OMNI2 / "config.json", model_type="llama"),
        ["config.json", "'llama'", "omni2_speech2s_qwen2"],
    ),
    "speech to text": (
        "config.json",
        edited(OMNI2 / "config.json", speech_generator=None),
        ["config.json has no speech_generator"],
    ),
    "another projector": (
        "config.json",
        edited(OMNI2 / "config.json", speech_projector_type="mlp"),
        ["config.json", "'mlp'", "'linear'"],
    ),
    "missing dimension": (
        "config.json",
        edited(OMNI2 / "config.json", hidden_size=None),
        ["config.json has no 'hidden_size'"],
    ),
    "dimension of another type": (
        "config.json",
        edited(OMNI2 / "config.json", hidden_size="big"),
        ["config.json", "hidden_size is 'big'"],
    ),
    "other dimensions": (
        "config.json",
        edited(OMNI2 / "config.json", num_hidden_layers=1),
        ["unexpected model.layers.1.", "tensors do not fit"],
    ),
    "vocabulary too small": (
        "config.json",
        edited(OMNI2 / "config.json", unit_vocab_size=9999),
        ["9999 units", "only 6987 tokens"],
    ),
    "scaled positions": (
        "config.json",
        edited(OMNI2 / "config.json", rope_scaling={"type": "yarn"}),
        ["config.json", "not supported"],
    ),
    "no stream_params": (
        "config.json",
        edited(OMNI2 / "config.json", stream_params=None),
        ["config.json", "stream_params is None"],
    ),
    "zero in stream_params": (
        "config.json",
        edited(OMNI2 / "config.json", stream_params="(0,10)"),
        ["stream_params is '(0,10)'"],
    ),
    "damaged Whisper beside it": (
        "speech_encoder/tiny.pt",
        b"PK\x03\x04 and so on",
        ["tiny.pt", "torch weights file"],
    ),
    "damaged generation_config": ("generation_config.json", "{", ["generation_config.json"]),
}


@pytest.mark.parametrize("files, content, says", RELEASES.values(), ids=RELEASES)
def test_release(files, content, says, tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    for file in files.split():
        if content is None:
            (release / file).unlink()
        else:
            replace(release / file, content)
    assert_refused(tmp_path, "--omni2", release, says=[str(release), *says])


def test_another_tokenizer(tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    for file in (release / "tts_tokenizer").iterdir():
        file.unlink()
        file.symlink_to(OMNI2 / file.name)
    assert_refused(tmp_path, "--omni2", release, says=["tts_tokenizer has no <sep>"])


def test_code_in_stream_params_is_not_run(tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    code = f"__import__('os').system('touch {tmp_path}/ran') or (3,10)"
    replace(release / "config.json", edited(OMNI2 / "config.json", stream_params=code))
    assert_refused(
        tmp_path,
        "--omni2",
        release,
        says=["config.json: stream_params is", "two positive integers"],
    )
    assert not (tmp_path / "ran").exists()


def test_all_complaints_at_once(tmp_path):
    """Missing, unexpected, of a wrong shape, and a tied head that differs, each by name."""
    tensors = load_file(WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["model.stranger"] = np.zeros(3, np.float32)
    tensors["speech_generator.gate.0.bias"] = np.zeros(49, np.float32)
    tensors["speech_generator.model.lm_head.weight"] = tensors[
        "speech_generator.model.lm_head.weight"
    ] + np.float32(1e-3)
    release = linked(OMNI2, tmp_path / "release")
    (release / "model.safetensors").unlink()
    save_file(tensors, release / "model.safetensors")
    says = [
        f"{release / 'model.safetensors'}: 4 tensors do not fit",
        "missing model.norm.weight (shape [64])",
        "unexpected model.stranger",
        "speech_generator.gate.0.bias has shape [49], expected [48]",
        "speech_generator.model.lm_head.weight differs from "
        "speech_generator.model.model.embed_tokens.weight",
    ]
    assert_refused(tmp_path, "--omni2", release, says=says)


def test_shards(tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    index = release / "model.safetensors.index.json"
    for weight_map, says in (
        ({"lm_head.weight": "absent.safetensors"}, ["absent.safetensors", "No such file"]),
        (
            {"lm_head.bias": "model.safetensors"},
            ["index.json lists tensors", "lm_head.bias (in model.safetensors)"],
        ),
        (None, ["index.json has no weight_map"]),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(tmp_path, "--omni2", release, says=[str(release), *says])


# ---- a decoder ----

YAML = (DECODER / "cosyvoice.yaml").read_text()
DECODERS = {
    "no yaml": ("cosyvoice.yaml", None, ["has none of cosyvoice.yaml"]),
    "damaged yaml": ("cosyvoice.yaml", YAML + "\n\t]: [", ["cannot read", "cosyvoice.yaml"]),
    "another yaml": (
        "cosyvoice.yaml",
        "sample_rate: 24000\n",
        ["cosyvoice.yaml is not a CosyVoice2", "'flow'"],
    ),
    "dangling reference": (
        "cosyvoice.yaml",
        YAML.replace("!ref <sample_rate>", "!ref <rate>"),
        ["cosyvoice.yaml", "'rate'"],
    ),
    "another scheduler": (
        "cosyvoice.yaml",
        YAML.replace("'cosine'", "'linear'"),
        ["cosyvoice.yaml: flow.decoder.cfm_params.content.t_scheduler is 'linear'"],
    ),
    "a word for a number": (
        "cosyvoice.yaml",
        YAML.replace("nb_harmonics: 8", "nb_harmonics: many"),
        ["harmonics is 'many'"],
    ),
    "no flow.pt": ("flow.pt", None, ["flow.pt", "No such file"]),
    "cut short": (
        "flow.pt",
        (DECODER / "flow.pt").read_bytes()[:9999],
        ["flow.pt as a torch weights file"],
    ),
    "another model's file": (
        "flow.pt",
        (DECODER / "hift.pt").read_bytes(),
        ["tensors do not fit: missing flow.pt: input_embedding.weight (shape [6561, 64])"],
    ),
    "damaged campplus.onnx": ("campplus.onnx", b"\x07garbage", ["campplus.onnx"]),
    "empty campplus.onnx": ("campplus.onnx", b"", ["campplus.onnx is not"]),
}


@pytest.mark.parametrize("file, content, says", DECODERS.values(), ids=DECODERS)
def test_decoder(file, content, says, tmp_path):
    decoder = linked(DECODER, tmp_path / "decoder")
    (decoder / file).unlink() if content is None else replace(decoder / file, content)
    assert_refused(tmp_path, "--decoder", decoder, says=[str(decoder), *says])


def test_yaml_runs_nothing(tmp_path):
    """hyperpyyaml's tags are read as plain values; Python's own are refused."""
    decoder = linked(DECODER, tmp_path / "decoder")
    replace(
        decoder / "cosyvoice.yaml", YAML + f"\ntrap: !apply:os.system ['touch {tmp_path}/ran']\n"
    )
    assert cosyvoice.read(decoder)[:2] == cosyvoice.read(DECODER)[:2]
    replace(
        decoder / "cosyvoice.yaml",
        YAML + f"\ntrap: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n",
    )
    assert_refused(
        tmp_path, "--decoder", decoder, says=["cannot read", "cosyvoice.yaml", "os.system"]
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entries",
    [
        [1],
        {"a": 1},
        {"a": {}},
        {"a": {"embedding": torch.zeros(5)}},
        {"../a": {"embedding": torch.zeros(192)}},
    ],
)
def test_stored_voices(entries, tmp_path):
    torch.save(entries, tmp_path / "spk2info.pt")
    with pytest.raises(ConversionError, match=r"spk2info\.pt"):
        read.stored_voices(tmp_path / "spk2info.pt", 192)


# ---- the command ----


def test_other_sources(tmp_path):
    torch.save(
        {"model_state_dict": torch.load(WHISPER, weights_only=True)["model_state_dict"]},
        tmp_path / "no_dims.pt",
    )
    torch.save([1, 2], tmp_path / "list.pt")
    for args, says in (
        (["--omni2", tmp_path / "nowhere"], ["nowhere does not exist"]),
        (["--whisper", DECODER / "flow.pt"], ["flow.pt has no 'model_state_dict'"]),
        (["--whisper", tmp_path / "list.pt"], ["list.pt has no 'model_state_dict'"]),
        (["--whisper", tmp_path / "no_dims.pt"], ["no_dims.pt is not an OpenAI Whisper file"]),
        (
            ["--whisper", OMNI2],
            ["config.json: model_type is 'omni2_speech2s_qwen2', expected 'whisper'"],
        ),
        (
            ["--qwen", OMNI2],
            ["config.json: model_type is 'omni2_speech2s_qwen2', expected 'qwen2'"],
        ),
        (["--voice", "a=b.wav"], ["b.wav", "No such file"]),
        (["--voice", "b.wav"], ["--voice 'b.wav': expected NAME=prompt.wav"]),
        (
            ["--voice", f"../a={GOLDENS / 'audio' / 'short_d.wav'}"],
            ["'../a' cannot be the name of a voice"],
        ),
        (["--voice", f"a={GOLDENS / 'audio' / 'short_d.wav'}"], ["is not a checkpoint"]),
        (["--decoder", DECODER, "--voice", f"a={WHISPER}"], ["tiny.pt is not audio"]),
        ([], ["nothing to convert"]),
        (["--to-torch", tmp_path / "nowhere"], ["nowhere does not exist"]),
        (["--to-torch", DECODER], ["is not an omni2-jax checkpoint", "config.json"]),
        (["--to-torch", OMNI2], [str(OMNI2 / "config.json"), "is not an omni2-jax config"]),
        (["--to-torch", OMNI2, "--qwen", OMNI2], ["--to-torch takes --out and nothing else"]),
    ):
        assert_refused(tmp_path, *args, says=says)


def test_the_same_part_twice(tmp_path):
    release = read.read_whisper(WHISPER)
    with pytest.raises(ConversionError, match="speech_encoder would come from two sources"):
        combine([release, release])


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write to" in convert("--whisper", WHISPER, "--out", tmp_path / "file" / "ckpt")
    assert "exists already" in convert("--whisper", WHISPER, "--out", tmp_path)
    (tmp_path / "theirs").mkdir()
    stated = edited(OMNI2 / "config.json", speech_encoder=None)
    (tmp_path / "theirs" / "config.json").write_text(stated)
    assert "theirs/config.json is not an omni2-jax config" in convert(
        "--whisper", WHISPER, "--out", tmp_path / "theirs"
    )
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"] and (
        tmp_path / "file"
    ).read_bytes() == b""


@pytest.fixture
def full_disk():
    """No file can grow beyond 3 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(tmp_path, full_disk, checkpoint_dir):
    assert_refused(tmp_path, "--decoder", DECODER, says=["params/flow", "File too large"])
    assert_refused(
        tmp_path,
        "--to-torch",
        checkpoint_dir,
        says=["cannot write", "LLaMA-Omni2", "File too large"],
    )


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    release = read.read_whisper(WHISPER)
    kernel = release.params["speech_encoder"]["conv2"]["kernel"]
    release.params["speech_encoder"]["conv2"]["kernel"] = dataclasses.replace(
        kernel, read=interrupted
    )
    with pytest.raises(KeyboardInterrupt):
        write.write(tmp_path / "ckpt", release, {})
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint(tmp_path, checkpoint_dir):
    damaged = linked(checkpoint_dir, tmp_path / "damaged")
    largest = max(
        (damaged / "params" / "speech_lm").rglob("*"), key=lambda path: path.stat().st_size
    )
    replace(largest, largest.read_bytes()[:1000])
    assert_refused(
        tmp_path, "--to-torch", damaged, says=[str(damaged / "params" / "speech_lm"), "damaged"]
    )
    assert convert("--whisper", WHISPER, "--out", tmp_path / "encoder") == 0
    assert_refused(
        tmp_path,
        "--to-torch",
        tmp_path / "encoder",
        says=["encoder holds speech_encoder: neither a whole LLaMA-Omni2"],
    )
    silent = linked(checkpoint_dir, tmp_path / "silent")
    shutil.rmtree(silent / "params" / "vocoder")
    assert_refused(tmp_path, "--to-torch", silent, says=["silent has a flow and no vocoder"])
    mute = linked(checkpoint_dir, tmp_path / "mute")
    shutil.rmtree(mute / "params" / "speech_lm")
    assert_refused(
        tmp_path, "--to-torch", mute, says=["mute lacks speech_lm; the released layout holds"]
    )
    with pytest.raises(ValueError, match=r"^gs://bucket/ckpt is in Cloud Storage; copy it"):
        export.write(
            cast(Path, epath.Path("gs://bucket/ckpt")), tmp_path / "out", rich.progress.Progress()
        )


@pytest.mark.parametrize("mix", ["sum", "hidden", "text"])
def test_another_fusion_than_the_released_one(tmp_path, checkpoint_dir, mix):
    other = linked(checkpoint_dir, tmp_path / "other")
    Omni2Config.load(other / "config.json").replace(mix=mix).save(other / "config.json")
    says = [f'other: its mix is "{mix}", but the released model has gate fusion only']
    assert_refused(tmp_path, "--to-torch", other, says=says)


def test_exit_code_of_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "convert",
        "--omni2",
        str(tmp_path),
        "--out",
        str(tmp_path / "ckpt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDENS.parent.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == f"error: {tmp_path} has neither model.safetensors nor model.safetensors.index.json\n"
    )


# ---- the engine ----


def test_a_table_that_does_not_fit_the_model():
    """A target that does not exist and one that nothing sets are reported, a dropped name not."""
    source = {
        name: LazyArray((2,), np.dtype(np.float32), lambda: np.ones(2, np.float32))
        for name in ("a", "b.step")
    }
    target = {"x": np.zeros(2, np.float32), "y": np.zeros(2, np.float32)}
    table = Table((Rule("a", "x"), Rule("a", "z")), dropped={r".*\.step": "counts"})
    with pytest.raises(ConversionError) as error:
        plan(table, source, target, "file")
    assert (
        str(error.value)
        == "file: 2 tensors do not fit: the table sets z, which the model does not have; "
        "nothing in the table sets y"
    )

"""Releases made to do harm: refused in one line, without reading other files or running code."""

import json
import os
import pickle

import numpy as np
import onnx
import pytest
import torch

from omni2_jax.convert import json_files, safetensors_files
from omni2_jax.convert.formats import onnx_file, torch_file
from omni2_jax.convert.plan import ConversionError, Rule, Table, plan
from omni2_jax.convert.tables.speech_tokenizer import read
from tests.support.language_models import edited, plain_qwen2
from tests.support.paths import DECODER, GOLDENS
from tests.support.releases import convert, linked, replace

OMNI2 = GOLDENS / "omni2"
WEIGHTS = (OMNI2 / "model.safetensors").read_bytes()
DEEP = '{"a": ' * 20_000 + "1" + "}" * 20_000
DIGITS = '{"vocab_size": ' + "9" * 100_000 + "}"


def refused(tmp_path, *args):
    """The one line that the command ends with; it leaves nothing behind."""
    out = tmp_path / "out" / "ckpt"
    message = convert(*args, "--out", out)
    assert isinstance(message, str) and message.startswith("error: "), message
    assert "\n" not in message and len(message) < 1500
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return message


# ---- config.json ----

CHANGES = {  # keys of config.json -> what the message says
    "negative width": ({"hidden_size": -64}, "hidden_size is -64, expected greater than"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
    "heads that do not divide": ({"num_attention_heads": 5}, "5 heads do not divide the width of"),
    "groups that do not divide": ({"num_key_value_heads": 3}, "expected a divisor of heads"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
    "a huge vocabulary": ({"vocab_size": 10**40}, "vocab_size is an integer of"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5, expected"),
    "rope_scaling a number": ({"rope_scaling": 5}, "rope_scaling is 5, expected null or an object"),
    "rope_scaling a text": ({"rope_scaling": "x"}, "rope_scaling is 'x', expected null or"),
    "rope_theta NaN": ({"rope_theta": float("nan")}, "rope_theta is nan, expected"),
    "rope_theta zero": ({"rope_theta": 0}, "rope_theta is 0, expected"),
    "rms_norm_eps negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected"),
    "layer_types a number": ({"layer_types": 7}, "sliding windows and scaled positions"),
    "hidden_act a list": ({"hidden_act": ["silu"] * 999}, "hidden_act is ['silu',"),
    "model_type a list": ({"model_type": []}, "model_type is [], expected 'omni2_speech2s_qwen2'"),
    "speech_encoder a number": ({"speech_encoder": 5}, "speech_encoder is 5, expected the name"),
    "speech_encoder with NUL": ({"speech_encoder": "a\0b"}, "expected the name of a file"),
    "speech_encoder half a pair": ({"speech_encoder": "\ud800"}, "expected the name of a file"),
    "heads of no whole number": ({"speech_encoder_heads": "many"}, "heads is 'many', expected"),
    "no stride": ({"speech_encoder_ds_rate": 0}, "speech_encoder_ds_rate is 0, expected"),
    "negative units": ({"unit_vocab_size": -1}, "unit_vocab_size is -1, expected"),
    "no prompt": ({"tokenizer_model_max_length": 0}, "tokenizer_model_max_length is 0, expected"),
    "eos nested": ({"eos_token_id": [[1]]}, "eos_token_id.0 is [1], expected"),
    "eos negative": ({"eos_token_id": -1}, "eos_token_id.0 is -1, expected"),
    "a generator of no size": (
        {"speech_generator": {"model_type": "qwen2"}},
        "has no 'vocab_size'",
    ),
    "stream_params half a pair": ({"stream_params": "\ud800"}, "stream_params is '\\ud800'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_config(name, tmp_path):
    changes, says = CHANGES[name]
    release = linked(OMNI2, tmp_path / "release")
    edited(release / "config.json", lambda content: content.update(changes))
    message = refused(tmp_path, "--omni2", release)
    assert str(release / "config.json") in message or str(release) in message
    assert says in message, message


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (DEEP, "its JSON is nested too deeply"),
        (DIGITS, "it has an integer of more than 4300 digits"),
        (b"\xff\xfe\xff", "it is not JSON"),
        ("7", "holds a int, expected an object"),
    ],
)
def test_json(file, content, says, tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    replace(release / file, content)
    message = refused(tmp_path, "--omni2", release)
    assert str(release / file) in message and says in message


def test_json_is_bounded_and_regular(tmp_path):
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(json_files.MAX_BYTES + 1)
    with pytest.raises(ConversionError, match=r"large\.json has 67108865 bytes, expected a JSON"):
        json_files.read(tmp_path / "large.json")
    os.mkfifo(tmp_path / "pipe")
    for read_file in (json_files.read, safetensors_files.read, torch_file, onnx_file):
        with pytest.raises(ConversionError, match="pipe is not a regular file"):
            read_file(tmp_path / "pipe")


@pytest.mark.parametrize("outside", ["absolute", "relative"])
def test_config_leads_to_files_of_the_release_only(outside, tmp_path, capfd):
    """A Whisper file elsewhere is not opened; --whisper asks for it."""
    whisper = tmp_path / "elsewhere.pt"
    whisper.write_bytes((GOLDENS / "whisper" / "tiny.pt").read_bytes())
    release = linked(OMNI2, tmp_path / "release")
    name = str(whisper) if outside == "absolute" else "../elsewhere.pt"
    edited(release / "config.json", lambda content: content.update(speech_encoder=name))
    assert convert("--omni2", release, "--out", tmp_path / "one") == 0
    assert "speech_encoder leads out of the directory" in capfd.readouterr().err
    assert convert("--omni2", release, "--whisper", whisper, "--out", tmp_path / "two") == 0
    heads = [
        json.loads((tmp_path / out / "config.json").read_text())["speech_encoder"]["heads"]
        for out in ("one", "two")
    ]
    assert heads == [1, 4]  # widths of 64, and what the file says


# ---- safetensors ----


def with_header(text):
    """A safetensors file of the goldens' data with another header."""
    size = int.from_bytes(WEIGHTS[:8], "little")
    return len(text).to_bytes(8, "little") + text + WEIGHTS[8 + size :]


def entry(**changes):
    described = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    return with_header(json.dumps({"x": described}).encode())


HEADERS = {
    "a shape of floats": (entry(shape=[1.0]), "is corrupt"),
    "a shape of booleans": (entry(shape=[True]), "is corrupt"),
    "negative sizes": (entry(shape=[-1, -1]), "is corrupt"),
    "a text for a shape": (entry(shape="1"), "is corrupt"),
    "offsets of another length": (entry(data_offsets=[0, 4, 8]), "is corrupt"),
    "negative offsets": (entry(data_offsets=[-4, 0]), "is corrupt"),
    "a list for a type": (entry(dtype=["F32"]), "is corrupt"),
    "behind the end": (entry(shape=[10**12], data_offsets=[0, 4 * 10**12]), "is cut short"),
    "nested deeply": (with_header(DEEP.encode()), "its JSON is nested too deeply"),
    "many digits": (with_header(DIGITS.encode()), "more than 4300 digits"),
    "no Unicode": (with_header(b'{"\xff": 1}'), "it is not JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_header(name, tmp_path):
    content, says = HEADERS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConversionError) as error:
        safetensors_files.read(tmp_path / "x.safetensors")
    message = str(error.value)
    assert str(tmp_path / "x.safetensors") in message and says in message and len(message) < 500


def test_large_safetensors_headers(tmp_path):
    """They are refused by their size, before they are read or parsed."""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((10**9).to_bytes(8, "little") + b'{"__metadata__": {"a": "')
        file.truncate(10**9 + 8)
    with pytest.raises(ConversionError, match="header has 1000000000 bytes, expected 100000000"):
        safetensors_files.read(path)
    tensors = (f'"{i}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' for i in range(100_001))
    path.write_bytes(with_header(("{" + ",".join(tensors) + "}").encode()))
    with pytest.raises(ConversionError, match="lists 100001 tensors, expected 100000 at most"):
        safetensors_files.read(path)


INDICES = {
    "a number": 5,
    "a list": ["model.safetensors"],
    "null": None,
    "empty": "",
    "NUL": "a\0b.safetensors",
    "half a surrogate pair": "\ud800.safetensors",
    "a parent": "../model.safetensors",
    "an absolute path": str(OMNI2 / "model.safetensors"),
}


@pytest.mark.parametrize("name", INDICES)
def test_index(name, tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    index = release / "model.safetensors.index.json"
    weight_map = {"lm_head.weight": "model.safetensors", "model.norm.weight": INDICES[name]}
    index.write_text(json.dumps({"weight_map": weight_map}))
    message = refused(tmp_path, "--omni2", release)
    assert f"{index}: the file of 'model.norm.weight' is" in message
    assert "expected the name of a file" in message


@pytest.mark.parametrize("weight_map", [5, [["a", "b"]], "model.safetensors"])
def test_index_of_another_type(weight_map, tmp_path):
    release = linked(OMNI2, tmp_path / "release")
    index = release / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert f"{index} has no weight_map" in refused(tmp_path, "--omni2", release)


def test_weights_that_are_no_floats():
    source = {"a": safetensors_files.LazyArray((2,), np.dtype(np.int64), lambda: np.ones(2, int))}
    with pytest.raises(ConversionError, match="a has type int64, expected a floating-point type"):
        plan(Table((Rule("a", "x"),)), source, {"x": np.zeros(2, np.float32)}, "file")


# ---- torch, ONNX, yaml ----


class Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("file", ["flow.pt", "hift.pt", "spk2info.pt"])
@pytest.mark.parametrize("form", ["zip", "plain"])
def test_code_in_pickles_is_not_run(file, form, tmp_path):
    decoder = linked(DECODER, tmp_path / "decoder")
    content = {"a": Trap(tmp_path / "ran")}
    (decoder / file).unlink(missing_ok=True)
    if form == "zip":
        torch.save(content, decoder / file)
    else:
        (decoder / file).write_bytes(pickle.dumps(content))
    message = refused(tmp_path, "--decoder", decoder)
    assert f"cannot read {decoder / file} as a torch weights file" in message
    assert not (tmp_path / "ran").exists()


STATES = {
    "a number for a name": ({1: torch.zeros(2)}, "holds 1 as a name"),
    "a sparse tensor": ({"a": torch.zeros(2, 2).to_sparse()}, "a is a torch.sparse_coo tensor"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_dicts(name, tmp_path):
    state, says = STATES[name]
    torch.save(state, tmp_path / "flow.pt")
    with pytest.raises(ConversionError, match=says):
        torch_file(tmp_path / "flow.pt")


@pytest.mark.parametrize("dims", [[1], {"n_audio_head": "many"}, {"n_audio_head": 0}])
def test_dims_of_a_whisper_file(dims, tmp_path):
    content = torch.load(GOLDENS / "whisper" / "tiny.pt", weights_only=True)
    torch.save(content | {"dims": dims}, tmp_path / "tiny.pt")
    message = refused(tmp_path, "--whisper", tmp_path / "tiny.pt")
    assert str(tmp_path / "tiny.pt") in message and ("heads is" in message or "'dims'" in message)


def test_onnx_that_leads_to_other_files(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    nothing = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([node], "graph", [nothing], [], [tensor])
    path = tmp_path / "speech_tokenizer_v2.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ConversionError, match="keeps 'w' in another file, expected all in one"):
        read(path)


YAML = (DECODER / "cosyvoice.yaml").read_text()
YAMLS = {
    "aliases": (f"{YAML}\na: &a [1, 2]\nb: [*a, *a]\n", "aliases (*name) are not supported"),
    "nested deeply": (YAML + "\na: " + "[" * 5000 + "]" * 5000, "it is nested too deeply"),
    "an impossible date": (f"{YAML}\na: 2001-99-99\n", "cannot read"),
    "a list": ("[1]", "is not a CosyVoice2 decoder configuration"),
    "a negative size": (
        YAML.replace("num_blocks: ", "num_blocks: -"),
        "flow.encoder.num_blocks is",
    ),
    "too large": (YAML + "#" * 2**20, "expected 1048576 at most"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml(name, tmp_path):
    content, says = YAMLS[name]
    decoder = linked(DECODER, tmp_path / "decoder")
    replace(decoder / "cosyvoice.yaml", content)
    message = refused(tmp_path, "--decoder", decoder)
    assert str(decoder / "cosyvoice.yaml") in message and says in message, message


# ---- tokenizers ----

TEMPLATES = {
    "empty": "",
    "of another type": 5,
    "does not parse": "{% for %}",
    "raises": "{{ raise_exception('no\nroles') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "names what there is not": "{{ nothing.at.all }}",
    "leaves out the turns": "hello",
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return plain_qwen2(tmp_path_factory.mktemp("qwen") / "Qwen2.5", layers=1)


@pytest.mark.parametrize("option", ["--llm", "--omni2"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template(name, option, qwen, tmp_path):
    source = linked({"--llm": qwen, "--omni2": OMNI2}[option], tmp_path / "source")
    template = {"chat_template": TEMPLATES[name]}
    edited(source / "tokenizer_config.json", lambda content: content.update(template))
    message = refused(tmp_path, option, source)
    assert str(source) in message and ("template" in message or "tokenizer" in message)


def test_code_of_a_tokenizer_is_not_run(tmp_path):
    """Nor is it asked whether to run it."""
    release = linked(OMNI2, tmp_path / "release")
    source = release / "tts_tokenizer"
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    (source / "theirs.py").write_text(code)
    theirs = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    edited(source / "tokenizer_config.json", lambda content: content.update(theirs))
    assert f"{source} is not a readable tokenizer" in refused(tmp_path, "--omni2", release)
    assert not (tmp_path / "ran").exists()


def test_a_family_that_is_not_known(qwen, tmp_path):
    for kind, shown in {"qwen3_moe": "'qwen3_moe'", 3: "3", None: "None"}.items():
        source = linked(qwen, tmp_path / f"source {kind}")
        edited(source / "config.json", lambda content, kind=kind: content.update(model_type=kind))
        says = f"{source / 'config.json'}: model_type is {shown}, expected 'qwen2' or 'qwen3'"
        assert says in refused(tmp_path, "--llm", source)


QWEN3 = {
    "biases": ({"attention_bias": True}, "attention_bias is True, expected false"),
    "no head size": ({"head_dim": 0}, "head_dim is 0, expected a positive number"),
    "a negative head size": ({"head_dim": -16}, "head_dim is -16, expected"),
    "an odd head size": ({"head_dim": 15}, "head_size is 15, expected an even number"),
    "windows": ({"layer_types": ["sliding_attention"]}, "sliding windows and scaled positions"),
    "scaled": ({"rope_parameters": {"rope_type": "yarn"}}, "sliding windows and scaled positions"),
}


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3(name, qwen, tmp_path):
    changes, says = QWEN3[name]
    source = linked(qwen, tmp_path / "source")
    changes = {"model_type": "qwen3"} | changes
    edited(source / "config.json", lambda content: content.update(changes))
    message = refused(tmp_path, "--llm", source)
    assert f"{source / 'config.json'}: " in message and says in message, message


def test_brackets_in_names_are_no_markup(tmp_path):
    """Names of files are printed as they are."""
    source = tmp_path / "[red]x[/]"
    message = refused(tmp_path, "--llm", source)
    assert message.startswith(f"error: {source} does not exist, ")
    whisper = tmp_path / "[bold]tiny.pt"
    whisper.write_bytes((GOLDENS / "whisper" / "tiny.pt").read_bytes())
    assert convert("--whisper", whisper, "--out", tmp_path / "ti[/x]ny") == 0

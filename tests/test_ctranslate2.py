"""CTranslate2's Whisper directories as the speech encoder."""

import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import SpeechEncoderConfig
from omni2_jax.convert import read
from omni2_jax.convert.plan import ConversionError
from omni2_jax.models.speech_encoder import SpeechEncoder
from tests.support.paths import EXAMPLES

SIZES = SpeechEncoderConfig(mels=4, frames=6, width=8, layers=2, heads=2)
CODES = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.int16): 2}
CODES[np.dtype(np.float16)] = 4


def packed_text(text: str) -> bytes:
    content = text.encode() + b"\0"
    return struct.pack("<H", len(content)) + content


def model_bin(variables: dict[str, np.ndarray], model: str = "WhisperSpec") -> bytes:
    content = struct.pack("<I", 6) + packed_text(model) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        content += packed_text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", CODES[array.dtype], array.nbytes) + array.tobytes()
    return content + struct.pack("<I", 0)  # no aliases


def tiny_variables() -> dict[str, np.ndarray]:
    """An encoder of SIZES in float16; the feed-forward networks of layer 1 are in int8."""
    random, d = np.random.default_rng(0), SIZES.width

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float16)

    variables = {
        "encoder/num_heads": np.array(SIZES.heads, np.int16),
        "encoder/position_encodings/encodings": draw(SIZES.frames, d),
        "encoder/conv1/weight": draw(d, SIZES.mels, 3),
        "encoder/conv1/bias": draw(d),
        "encoder/conv2/weight": draw(d, d, 3),
        "encoder/conv2/bias": draw(d),
        "encoder/layer_norm/gamma": draw(d),
        "encoder/layer_norm/beta": draw(d),
        "decoder/layer_norm/gamma": draw(d),
    }
    for i in range(SIZES.layers):
        linear = {"self_attention/linear_0": (3 * d, d), "self_attention/linear_1": (d, d)}
        linear |= {"ffn/linear_0": (4 * d, d), "ffn/linear_1": (d, 4 * d)}
        for name, shape in linear.items():
            variables[f"encoder/layer_{i}/{name}/weight"] = draw(*shape)
            variables[f"encoder/layer_{i}/{name}/bias"] = draw(shape[0])
        for name in ("self_attention", "ffn"):
            variables[f"encoder/layer_{i}/{name}/layer_norm/gamma"] = draw(d)
            variables[f"encoder/layer_{i}/{name}/layer_norm/beta"] = draw(d)
    for name in ("ffn/linear_0", "ffn/linear_1"):
        weight = variables[f"encoder/layer_1/{name}/weight"].astype(np.float32)
        scale = 127 / np.abs(weight).max(1)
        quantized = np.round(weight * scale[:, None]).astype(np.int8)
        variables[f"encoder/layer_1/{name}/weight"] = quantized
        variables[f"encoder/layer_1/{name}/weight_scale"] = scale.astype(np.float32)
    return variables


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    return folder


def test_every_tensor_finds_its_place(tmp_path):
    variables = tiny_variables()
    release = read.read_whisper(write(tmp_path / "tiny", model_bin(variables)))
    assert release.config.speech_encoder == SIZES
    params = {path: leaf.read() for path, leaf in flatten(release.params["speech_encoder"]).items()}

    def theirs(name: str) -> np.ndarray:
        return variables[f"encoder/{name}"].astype(np.float32)

    np.testing.assert_array_equal(params["positions"], theirs("position_encodings/encodings"))
    np.testing.assert_array_equal(params["conv1.kernel"], theirs("conv1/weight").transpose(2, 1, 0))
    np.testing.assert_array_equal(params["norm.scale"], theirs("layer_norm/gamma"))
    joined = theirs("layer_1/self_attention/linear_0/weight").reshape(3, 8, 8)
    for index, name in enumerate(("query", "key", "value")):
        kernel = params[f"blocks.{name}.kernel"][1].reshape(8, 8)
        np.testing.assert_array_equal(kernel, joined[index].T)
    values = theirs("layer_0/self_attention/linear_0/bias")[16:]
    np.testing.assert_array_equal(params["blocks.value.bias"][0].ravel(), values)
    np.testing.assert_array_equal(
        params["blocks.attention_norm.bias"][0], theirs("layer_0/self_attention/layer_norm/beta")
    )
    scale = theirs("layer_1/ffn/linear_0/weight_scale")
    expected = theirs("layer_1/ffn/linear_0/weight") / scale[:, None]
    np.testing.assert_allclose(params["blocks.up.kernel"][1], expected.T, rtol=1e-6)


def test_what_cannot_be_read_is_one_line(tmp_path):
    variables = tiny_variables()

    def fault(content: bytes) -> str:
        with pytest.raises(ConversionError) as caught:
            read.read_whisper(write(tmp_path / "bad", content))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = model_bin(variables)
    assert "is a TransformerSpec, expected WhisperSpec" in fault(
        model_bin(variables, "TransformerSpec")
    )
    assert "no CTranslate2 model of version 6: it begins with 9" in fault(b"\x09\0\0\0" + whole[4:])
    for size in (0, 3, 20, 60, len(whole) // 2):
        assert "model.bin is damaged" in fault(whole[:size])
    name = "encoder/layer_0/ffn/linear_0/weight"
    wide = dict(variables) | {name: np.zeros((32, 8), np.int16)}
    assert f"{name} has type int16, expected floating-point" in fault(model_bin(wide))
    absent = {key: value for key, value in variables.items() if key != name}
    assert f"{name} is missing" in fault(model_bin(absent))
    short = dict(variables) | {name: np.zeros((8, 8), np.float16)}
    assert "blocks.0.mlp.0.weight has shape [8, 8], expected [32, 8]" in fault(model_bin(short))


@pytest.mark.skipif("OMNI2_WHISPER" not in os.environ, reason="OMNI2_WHISPER names no directory")
def test_frames_are_those_of_faster_whisper():
    """OMNI2_WHISPER: the directory of a Whisper that faster-whisper reads."""
    faster_whisper = pytest.importorskip("faster_whisper")
    directory = Path(os.environ["OMNI2_WHISPER"])
    release = read.read_whisper(directory)
    config, leaves = release.config.speech_encoder, release.params["speech_encoder"]
    assert config
    graph = nnx.split(nnx.eval_shape(lambda: SpeechEncoder(config, nnx.Rngs(0))))[0]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf.read(), jnp.float32), leaves)
    padded, _ = recordings.pad([recordings.load(EXAMPLES / "question.wav")], 480_000)
    mel = features.log_mel(jnp.asarray(padded), mels=config.mels)
    ours = jax.jit(lambda params, mel: nnx.merge(graph, params)(mel))(params, mel)
    model = faster_whisper.WhisperModel(str(directory), device="cpu", compute_type="float32")
    theirs = np.array(model.encode(np.array(mel[0].T, order="C")))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

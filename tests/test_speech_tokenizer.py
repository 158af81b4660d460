"""The speech tokenizer against s3tokenizer 0.3.0, from its state dict and from the released ONNX
layout.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
import torch
from flax import nnx
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.convert.formats import abstract
from omni2_jax.convert.plan import ConversionError, plan, unplan
from omni2_jax.convert.tables.speech_tokenizer import infer_config, read, table
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.speech_tokenizer import SpeechTokenizer, tokenize
from tests.support.compare import assert_same
from tests.support.networks import TINY_TOKENIZER as TINY
from tests.support.networks import TOKENIZER_CLIPS as CLIPS
from tests.support.networks import abstract_model, draw_tokenizer, tokenizer_manifest
from tests.support.paths import AUDIO, GOLDENS

FOLDER = GOLDENS / "s3tokenizer"


def converted(source) -> dict:
    return jax.tree.map(
        lambda leaf: leaf.read(),
        plan(table(), source, abstract_model(SpeechTokenizer, TINY)[1], "tiny"),
    )


def model(params: dict, **changes) -> SpeechTokenizer:
    return nnx.merge(
        abstract_model(SpeechTokenizer, dataclasses.replace(TINY, **changes))[0], params
    )


@pytest.fixture(scope="module")
def state():
    return draw_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("units") / "model.safetensors"
    save_file(state, path)
    return read(path)


@pytest.fixture(scope="module")
def params(source):
    return converted(source)


@pytest.fixture(scope="module")
def tokenizer(params):
    return model(params)


@pytest.fixture(scope="module")
def clips():
    return [recordings.load(AUDIO / f"{name}.wav") for name in (*CLIPS, "speech_b")]


@pytest.fixture(scope="module")
def golden():
    return {name: np.load(FOLDER / f"{name}.npz") for name in (*CLIPS, "batch", "long")}


def noisy(rows, size: int) -> np.ndarray:
    """Rows of different lengths, [B, size, ...], with noise behind their ends."""
    out = (
        np.random.default_rng(0)
        .uniform(-1, 1, (len(rows), size, *rows[0].shape[1:]))
        .astype(np.float32)
    )
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


# ---- the network ----


def test_the_network_as_the_reference(tokenizer, golden, clips):
    """Goldens of each clip alone and of both; here they are one batch, padded with noise."""
    graph, params = nnx.split(tokenizer)

    @jax.jit
    def run(params, mel, lengths):
        net = nnx.merge(graph, params)
        hidden = net.encode(mel, lengths)
        return hidden, net.project(hidden), *net(mel, lengths)

    wav, samples = recordings.pad(clips[:2])
    frames = samples // features.WHISPER_HOP
    mel = [row[:n] for row, n in zip(features.log_mel(wav, samples), frames, strict=True)]
    hidden, projected, codes, lengths = run(params, noisy(mel, 290), frames)
    np.testing.assert_array_equal(lengths, golden["batch"]["code_lens"])
    for i, name in enumerate(CLIPS):
        n, one = lengths[i], golden[name]
        np.testing.assert_allclose(hidden[i, :n], one["hidden"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(projected[i, :n], one["project_down"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            projected[i, :n], golden["batch"]["project_down"][i, :n], rtol=0, atol=1e-4
        )
        np.testing.assert_array_equal(codes[i, :n], one["codes"])
        np.testing.assert_array_equal(codes[i, :n], golden["batch"]["codes"][i, :n])
        assert not codes[i, n:].any()


def test_from_audio_to_units(tokenizer, golden, clips):
    """Other lengths take no other compilation."""
    lengths = np.array([len(clip) for clip in clips[:2]])
    wav = noisy(clips[:2], 45000)
    codes, counts = tokenize(tokenizer, wav, lengths)
    for i, name in enumerate(CLIPS):
        np.testing.assert_array_equal(codes[i, : counts[i]], golden[name]["codes"])
    compiled = speech_tokenizer._tokenize._cache_size()
    shorter, counts = tokenize(tokenizer, wav, np.array([8000, 100]))
    assert speech_tokenizer._tokenize._cache_size() == compiled
    assert counts.tolist() == [13, 0] and not shorter[1].any()


def test_a_clip_has_to_hold_a_frame(tokenizer):
    with pytest.raises(ValueError, match="159 samples is too short; at least 160"):
        tokenize(tokenizer, np.zeros((1, 159), np.float32))


# ---- clips over 30 s ----


def test_a_long_clip_beside_a_short_one(tokenizer, golden, clips):
    long = np.resize(np.concatenate(clips), 57 * recordings.INPUT_RATE)
    codes, counts = tokenize(
        tokenizer, noisy([long, clips[0]], len(long)), np.array([len(long), len(clips[0])])
    )
    assert counts.tolist() == [1425, 67]
    np.testing.assert_array_equal(codes[0], golden["long"]["codes"])
    np.testing.assert_array_equal(codes[1, :67], golden["speech_a"]["codes"])


def test_windows_lose_no_unit(params):
    """Windows of 160 frames that share 48, joined by hand, for ends on both sides of every edge."""
    net = model(params, window=160, overlap=48)
    call = jax.jit(lambda mel, lengths: net(mel, lengths))
    lengths = np.array([1, 160, 161, 224, 272, 273, 300, 384, 385])
    mel = np.random.default_rng(1).normal(size=(len(lengths), 385, 128)).astype(np.float32)
    codes, counts = call(mel, lengths)
    assert counts.tolist() == [-(-n // 4) for n in lengths]
    for row, n, clip in zip(codes, lengths, mel, strict=True):
        starts = range(0, max(1, n - 48), 112)
        pieces = noisy([clip[start : min(start + 160, n)] for start in starts], 160)
        pieces = np.resize(pieces, (4, *pieces.shape[1:]))  # one shape for all
        alone, sizes = call(pieces, np.minimum(n - np.resize(starts, 4), 160))
        kept = [
            alone[i, (6 if i else 0) : sizes[i] - (6 if i + 1 < len(starts) else 0)]
            for i in range(len(starts))
        ]
        np.testing.assert_array_equal(row[: -(-n // 4)], np.concatenate(kept))


# ---- conversion ----


def test_released_dimensions_fit():
    keys = abstract(tokenizer_manifest())
    config = infer_config(keys, "manifest")
    assert config == SpeechTokenizerConfig() and config.units == 6561
    plan(table(), keys, abstract_model(SpeechTokenizer, config)[1], "manifest")


def test_there_and_back(source, params, state):
    assert infer_config(source, "tiny") == TINY
    back = dict(unplan(table(), flatten(params).get))
    assert back.keys() == state.keys()
    assert_same(back, state)


def test_a_torch_file(tmp_path, state, params):
    torch.save(
        {name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "tokenizer.pt"
    )
    assert_same(converted(read(tmp_path / "tokenizer.pt")), params)


class Exporter:
    """An ONNX graph with the nodes that hold the tokenizer's weights, in the released order, and
    some that hold none.
    """

    def __init__(self, state: dict[str, np.ndarray]):
        self.state, self.nodes, self.initializers = state, [], []

    def node(self, operator: str, *inputs: str) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"{len(self.nodes)}_{operator}"]))
        return self.nodes[-1].output[0]

    def constant(self, value: np.ndarray) -> str:
        """Every third one is stored as a node."""
        name, tensor = (
            f"onnx::{len(self.nodes) + len(self.initializers)}",
            numpy_helper.from_array(np.ascontiguousarray(value)),
        )
        if len(self.initializers) % 3:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            tensor.name = name
        self.initializers.append(tensor)
        return name

    def module(self, operator: str, x: str, module: str) -> str:
        names = [
            f"{module}.{part}" for part in ("weight", "bias") if f"{module}.{part}" in self.state
        ]
        return self.node(operator, x, *(self.constant(self.state[name]) for name in names))

    def linear(self, x: str, module: str) -> str:
        x = self.node("MatMul", x, self.constant(self.state[f"{module}.weight"].transpose()))
        bias = self.state.get(f"{module}.bias")
        return x if bias is None else self.node("Add", self.constant(bias), x)

    def gelu(self, x: str) -> str:
        return self.node(
            "Mul", x, self.node("Add", self.node("Erf", x), self.constant(np.float32(1)))
        )

    def block(self, x: str, name: str) -> str:
        y = self.module("LayerNormalization", x, f"{name}.attn_ln")
        query, key, value = (
            self.linear(y, f"{name}.attn.{part}") for part in ("query", "key", "value")
        )
        padded = self.node("Pad", value, self.constant(np.array([0, 0, 15, 0, 0, 15])))
        memory = self.module("Conv", padded, f"{name}.attn.fsmn_block")
        scores = self.node(
            "Add", self.node("MatMul", query, key), self.constant(np.zeros(1, np.float32))
        )
        y = self.linear(
            self.node("MatMul", self.node("Softmax", scores), value), f"{name}.attn.out"
        )
        x = self.node("Add", x, self.node("Add", y, memory))
        y = self.module("LayerNormalization", x, f"{name}.mlp_ln")
        return self.node(
            "Add", x, self.linear(self.gelu(self.linear(y, f"{name}.mlp.0")), f"{name}.mlp.2")
        )

    def save(self, path: Path) -> Path:
        x = self.gelu(self.module("Conv", "feats", "encoder.conv1"))
        x = self.gelu(self.module("Conv", x, "encoder.conv2"))
        for i in range(TINY.layers):
            x = self.block(x, f"encoder.blocks.{i}")
        x = self.node("Tanh", self.linear(x, "quantizer._codebook.project_down"))
        stored = [tensor for tensor in self.initializers if tensor.name]
        onnx.save(
            helper.make_model(helper.make_graph(self.nodes, "tokenizer", [], [], stored)), path
        )
        return path


def test_the_onnx_file(tmp_path, state, params):
    assert_same(converted(read(Exporter(state).save(tmp_path / "tokenizer.onnx"))), params)


def test_a_file_that_is_no_speech_tokenizer(tmp_path, state):
    with_key_bias = state | {"encoder.blocks.1.attn.key.bias": np.zeros(128, np.float32)}
    path = Exporter(with_key_bias).save(tmp_path / "other.onnx")
    with pytest.raises(
        ConversionError,
        match=r"other\.onnx is not the graph .*blocks\.1\.attn\.value is Add, expected MatMul",
    ):
        read(path)
    with pytest.raises(ConversionError, match=r"cannot read .*absent"):
        read(tmp_path / "absent.pt")
    with pytest.raises(
        ConversionError, match=r"some\.pt is not a speech tokenizer v2: 'encoder\.conv1\.weight'"
    ):
        infer_config({"x": LazyArray((1,), np.dtype(np.float32), lambda: None)}, "some.pt")

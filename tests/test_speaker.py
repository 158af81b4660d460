"""CAM++ against the released encoder's x-vectors, from the ONNX file and from torch names."""

import json

import jax
import numpy as np
import onnx
import pytest
from flax import nnx

from omni2_jax.audio import recordings
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import SpeakerConfig
from omni2_jax.convert.formats import abstract, onnx_file
from omni2_jax.convert.plan import ConversionError, plan, unplan
from omni2_jax.convert.tables.speaker import infer_config, table
from omni2_jax.convert.tables.speaker_onnx import from_onnx
from omni2_jax.models import speaker
from omni2_jax.models.speaker import Speaker, embed
from tests.support.compare import assert_same
from tests.support.networks import abstract_model
from tests.support.paths import AUDIO, DECODER, GOLDENS

ONNX = DECODER / "campplus.onnx"
CLIPS = ("short_d", "speech_a", "speech_b", "synth_c")
TINY = SpeakerConfig(channels=32, growth=8, bottleneck=2)


def converted(source) -> dict:
    return jax.tree.map(
        lambda leaf: leaf.read(),
        plan(table(TINY), source, abstract_model(Speaker, TINY)[1], "campplus"),
    )


def stored(tensors: dict[str, np.ndarray]) -> dict:
    return {
        name: LazyArray(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }


@pytest.fixture(scope="module")
def source():
    return from_onnx(onnx_file(ONNX), str(ONNX))


@pytest.fixture(scope="module")
def params(source):
    return converted(source)


@pytest.fixture(scope="module")
def encoder(params):
    return nnx.merge(abstract_model(Speaker, TINY)[0], params)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "cosy2_decoder" / "campplus.npz")


@pytest.fixture(scope="module")
def batch():
    """The four clips, of 0.6 to 2.7 s, padded with noise: [4, N] and their lengths."""
    x, lengths = recordings.pad([recordings.load(AUDIO / f"{clip}.wav") for clip in CLIPS])
    noise = np.random.default_rng(0).uniform(-1, 1, x.shape).astype(np.float32)
    return np.where(np.arange(x.shape[1]) < lengths[:, None], x, noise), lengths


# ---- the network ----


def test_one_clip_as_the_released_front_end(encoder, golden):
    x_vector = embed(encoder, recordings.load(AUDIO / "speech_a.wav")[None])
    np.testing.assert_allclose(x_vector, golden["frontend"][None], rtol=0, atol=1e-4)


def test_a_batch_is_its_clips_one_by_one(encoder, golden, batch):
    """Each golden is a clip alone; here noise lies behind the ends.

    Other lengths take no other compilation.
    """
    x, lengths = batch
    x_vectors = embed(encoder, x, lengths)
    for x_vector, clip in zip(x_vectors, CLIPS, strict=True):
        np.testing.assert_allclose(x_vector, golden[f"{clip}_torch"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(x_vector, golden[f"{clip}_ort"], rtol=0, atol=1e-4)
    compiled = speaker._embed._cache_size()
    shorter = embed(encoder, x, lengths - 2000)
    assert speaker._embed._cache_size() == compiled and np.abs(shorter - x_vectors).max() > 1e-2


def test_a_prompt_has_to_be_long_enough(encoder):
    with pytest.raises(ValueError, match="719 samples is too short; at least 720"):
        embed(encoder, np.zeros((1, 719), np.float32))


# ---- conversion ----

CONV_NORMS = (
    [(f"head.conv{k}", f"head.bn{k}") for k in (1, 2)]
    + [
        (f"head.layer{i}.{j}.conv{k}", f"head.layer{i}.{j}.bn{k}")
        for i in (1, 2)
        for j in (0, 1)
        for k in (1, 2)
    ]
    + [(f"head.layer{i}.0.shortcut.0", f"head.layer{i}.0.shortcut.1") for i in (1, 2)]
    + [
        ("xvector.tdnn.linear", "xvector.tdnn.nonlinear.batchnorm"),
        ("xvector.transit3.linear", "xvector.out_nonlinear.batchnorm"),
    ]
    + [
        (f"xvector.block{i}.tdnnd{j}.linear1", f"xvector.block{i}.tdnnd{j}.nonlinear2.batchnorm")
        for i, layers in enumerate(TINY.layers, 1)
        for j in range(1, layers + 1)
    ]
)


def test_released_dimensions_fit():
    keys = abstract(json.loads((GOLDENS / "manifests" / "campplus.json").read_text())["keys"])
    config = infer_config(keys, "campplus.json")
    assert config == SpeakerConfig()
    plan(table(config), keys, abstract_model(Speaker, config)[1], "campplus.json")


def test_config_of_the_onnx_file(source):
    assert infer_config(source, str(ONNX)) == TINY


def test_there_and_back(params):
    assert_same(converted(stored(dict(unplan(table(TINY), flatten(params).get)))), params)


def test_batch_norms_are_folded(source, params):
    """The same network with its normalisations moved out of the convolutions again, as a torch
    state dict has them.
    """
    draw, state = np.random.default_rng(0), {name: tensor.read() for name, tensor in source.items()}
    convs = [(c, n) for c, n in CONV_NORMS if f"{n}.weight" in state]
    assert len(convs) == 12 + 1 + 52 + 1
    for conv, norm in convs:
        size = len(state[f"{norm}.bias"])
        weight, variance = draw.uniform(0.5, 2, (2, size))
        mean, scale = draw.normal(size=size), weight / np.sqrt(variance + 1e-5)
        state[f"{conv}.weight"] = state[f"{conv}.weight"] / scale.reshape(
            -1, *[1] * (state[f"{conv}.weight"].ndim - 1)
        )
        state |= {f"{norm}.weight": weight, f"{norm}.bias": state[f"{norm}.bias"] + mean * scale}
        state |= {
            f"{norm}.running_mean": mean,
            f"{norm}.running_var": variance,
            f"{norm}.num_batches_tracked": np.array(7),
        }
    assert_same(converted(stored(state)), params, 1e-5)


def test_onnx_names_do_not_matter(tmp_path, params):
    """Another exporter numbers its initialisers otherwise, names no node, and shares or copies
    through Identity nodes.
    """
    model = onnx.load(ONNX)
    graph, names = model.graph, {}
    for i, tensor in enumerate(graph.initializer):
        names[tensor.name] = tensor.name = f"{7 * i}"
    aliases = [onnx.helper.make_node("Identity", [new], [f"{new}_used"]) for new in names.values()]
    for node in graph.node:
        node.name = ""
        node.input[:] = [f"{names[name]}_used" if name in names else name for name in node.input]
    nodes = [*aliases, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, tmp_path / "other.onnx")
    assert_same(converted(from_onnx(onnx_file(tmp_path / "other.onnx"), "other.onnx")), params)


def test_a_file_that_is_no_speaker_encoder(tmp_path):
    (tmp_path / "text.onnx").write_text("this is not a model")
    (tmp_path / "cut.onnx").write_bytes(ONNX.read_bytes()[:100_000])
    for name in ("absent.onnx", "text.onnx", "cut.onnx"):
        with pytest.raises(ConversionError, match=f"cannot read .*{name}") as error:
            onnx_file(tmp_path / name)
        assert "\n" not in str(error.value)
    short = dict(list(onnx_file(ONNX).items())[:400])
    with pytest.raises(ConversionError, match=r"some\.onnx"):
        plan(
            table(TINY),
            from_onnx(short, "some.onnx"),
            abstract_model(Speaker, TINY)[1],
            "some.onnx",
        )
    with pytest.raises(ConversionError, match="is not the graph of a CAM"):
        from_onnx(
            {"0.MatMul.1": LazyArray((2, 2), np.dtype(np.float32), lambda: None)}, "other.onnx"
        )

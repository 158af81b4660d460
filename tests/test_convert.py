"""Conversion and back: every released size by its shapes, tiny releases with their numbers."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from omni2_jax.checkpoint import parameters, tokenizer, voices
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.convert import export, formats, read, safetensors_files
from tests.support.paths import GOLDENS
from tests.support.releases import (
    convert,
    linked,
    manifest,
    replace,
    settings,
    tiny_release,
)

OMNI2, DECODER = GOLDENS / "omni2", GOLDENS / "cosy2_decoder"


def stored(directory) -> dict[str, np.ndarray]:
    """A checkpoint's parameters by part and path, as stored."""
    return {
        f"{part}.{path}": leaf.read()
        for part in parameters.parts(directory)
        for path, leaf in parameters.stored(directory, part).items()
    }


def module(directory) -> nnx.Module:
    """A checkpoint's model, in float32."""
    config = Omni2Config.load(directory / "config.json")
    return nnx.merge(*parameters.load(directory, config, jnp.float32))


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


# ---- released sizes, from shapes alone ----


SIZES = [
    size if size in ("0.5B", "7B") else pytest.param(size, marks=pytest.mark.slow)
    for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
]


@pytest.mark.parametrize("size", SIZES)
def test_every_released_size(size, tmp_path, monkeypatch):
    released = manifest(f"llama_omni2_{size}")
    linked(OMNI2 / "tts_tokenizer", tmp_path / "tts_tokenizer")
    for name in tokenizer.FILES:
        if (OMNI2 / name).exists():
            (tmp_path / name).symlink_to(OMNI2 / name)
    (tmp_path / "config.json").write_text(json.dumps(settings(released["info"])))
    (tmp_path / "model.safetensors").touch()
    keys = released["keys"]
    for tensors in (
        keys,
        {name: key for name, key in keys.items() if name not in released["info"]["tied_keys"]},
    ):
        monkeypatch.setattr(
            safetensors_files, "tensors", lambda _, tensors=tensors: formats.abstract(tensors)
        )
        release = read.read_omni2(tmp_path)
        assert set(release.params) == set(LANGUAGE_PARTS)
        assert {leaf.dtype.name for leaf in parameters.flatten(release.params).values()} == {
            "bfloat16"
        }
    config = importlib.import_module(f"configs.omni2_{size.lower().replace('.', '_')}").config
    assert config.only(*LANGUAGE_PARTS).replace(tokens=release.config.tokens) == release.config


def test_released_decoder(tmp_path, monkeypatch):
    (tmp_path / "cosyvoice.yaml").symlink_to(GOLDENS / "manifests" / "cosyvoice_real_dims.yaml")
    (tmp_path / "campplus.onnx").touch()
    monkeypatch.setattr(
        read, "torch_file", lambda path: formats.abstract(manifest(path.stem)["keys"])
    )
    monkeypatch.setattr(read, "onnx_file", lambda path: {})
    monkeypatch.setattr(
        read.speaker_onnx, "from_onnx", lambda *_: formats.abstract(manifest("campplus")["keys"])
    )
    release = read.read_decoder(tmp_path)
    assert release.config == Omni2Config().only("flow", "vocoder", "speaker")
    assert set(release.params) == {"flow", "vocoder", "speaker"}


def test_released_whisper(monkeypatch, tmp_path):
    released = manifest("whisper_large_v3_pt")
    monkeypatch.setattr(read, "torch_file", lambda *_: formats.abstract(released["keys"]))
    monkeypatch.setattr(read, "torch_dims", lambda _: released["info"]["dims"])
    release = read.read_whisper(tmp_path / "large-v3.pt")
    assert release.config == Omni2Config().only("speech_encoder")
    assert {leaf.dtype.name for leaf in parameters.flatten(release.params).values()} == {"float16"}


# ---- the tiny release of the goldens ----


@pytest.fixture(scope="module")
def back(checkpoint_dir, tmp_path_factory):
    """The tiny release's checkpoint in the released layout again."""
    out = tmp_path_factory.mktemp("back") / "release"
    assert convert("--to-torch", checkpoint_dir, "--out", out) == 0
    return out


def test_language_side_comes_back_bit_equal(back):
    assert_bit_equal(
        load_file(back / "LLaMA-Omni2" / "model.safetensors"),
        load_file(OMNI2 / "model.safetensors"),
    )
    stated, original = (
        json.loads((directory / "config.json").read_text())
        for directory in (back / "LLaMA-Omni2", OMNI2)
    )
    assert original.items() <= stated.items()
    for file in (
        "tokenizer.json",
        "vocab.json",
        "tts_tokenizer/vocab.json",
        "tts_tokenizer/tokenizer_config.json",
    ):
        assert (back / "LLaMA-Omni2" / file).read_bytes() == (OMNI2 / file).read_bytes()


def test_dimensions_are_those_of_the_checkpoint(checkpoint_dir):
    """The release's own config.json keeps only the rest."""
    config, original = (
        Omni2Config.load(checkpoint_dir / "config.json"),
        json.loads((OMNI2 / "config.json").read_text()),
    )
    wrong = {"hidden_size": 1, "unit_vocab_size": 1, "stream_params": "(1,1)"}
    generator = original["speech_generator"] | {"intermediate_size": 1, "vocab_size": 1}
    stated = original | wrong | {"speech_generator": generator}
    assert original.items() <= export.release_json(config, "bfloat16", stated).items()


def test_decoder_comes_back(back, checkpoint_dir):
    """flow.pt is bit-equal. In hift.pt the weight itself is the direction of its weight norm; the
    next test converts it again."""
    flows = (
        torch.load(directory / "flow.pt", weights_only=True)
        for directory in (back / "cosy2_decoder", DECODER)
    )
    assert_bit_equal(*({name: tensor.numpy() for name, tensor in flow.items()} for flow in flows))
    names = set(torch.load(back / "cosy2_decoder" / "hift.pt", weights_only=True))
    assert names == {
        name.removeprefix("generator.")
        for name in torch.load(DECODER / "hift.pt", weights_only=True)
    }
    for file in ("campplus.onnx", "cosyvoice.yaml"):
        assert (back / "cosy2_decoder" / file).read_bytes() == (DECODER / file).read_bytes()
    x_vector = torch.load(back / "cosy2_decoder" / "spk2info.pt", weights_only=True)["espeak"][
        "embedding"
    ]
    np.testing.assert_array_equal(
        x_vector.numpy()[0], np.load(checkpoint_dir / "voices" / "espeak.npy")
    )


def test_round_trip_is_bit_equal(back, checkpoint_dir, tmp_path):
    out = tmp_path / "again"
    assert (
        convert("--omni2", back / "LLaMA-Omni2", "--decoder", back / "cosy2_decoder", "--out", out)
        == 0
    )
    assert_bit_equal(stored(out), stored(checkpoint_dir))
    assert parameters.parts(out) == parameters.parts(checkpoint_dir)
    for file in ("config.json", "voices/espeak.npy"):
        assert (out / file).read_bytes() == (checkpoint_dir / file).read_bytes()


def test_encoder_inside_the_release_wins(checkpoint_dir):
    """The Whisper file beside the release holds other numbers."""
    name = "blocks.0.mlp.0.weight"
    inside = load_file(OMNI2 / "model.safetensors")[f"model.speech_encoder.{name}"]
    beside = torch.load(OMNI2 / "speech_encoder" / "tiny.pt", weights_only=True)[
        "model_state_dict"
    ][f"encoder.{name}"].numpy()
    assert inside.shape == beside.shape and not np.allclose(inside, beside, atol=0.05)
    np.testing.assert_array_equal(
        parameters.stored(checkpoint_dir, "speech_encoder")["blocks.up.kernel"].read()[0], inside.T
    )


# ---- another release: tied, bfloat16, three shards, no Whisper file, generation_config.json ----


def test_another_release(tmp_path, monkeypatch):
    tensors = tiny_release(tmp_path / "release")
    assert convert("--omni2", tmp_path / "release", "--out", tmp_path / "ckpt") == 0
    config = Omni2Config.load(tmp_path / "ckpt" / "config.json")
    assert (config.read, config.write, config.max_prompt, config.tokens.text_eos) == (
        2,
        5,
        2048,
        (422, 420),
    )
    assert (
        config.speech_encoder.heads == 2
        and config.speech_encoder.mels == 24
        and config.adapter.hidden == 56
    )
    assert config.llm.tied and config.llm.rope_theta == 5e5 and config.llm.norm_eps == 1e-5
    generation = tmp_path / "ckpt" / "generation_config.json"
    assert json.loads(generation.read_text())["repetition_penalty"] == 1.1
    assert parameters.stored(tmp_path / "ckpt", "llm")["embedding.table"].dtype.name == "bfloat16"

    monkeypatch.setattr(export, "SHARD_BYTES", 1_000_000)
    assert convert("--to-torch", tmp_path / "ckpt", "--out", tmp_path / "back") == 0
    back = tmp_path / "back" / "LLaMA-Omni2"
    weight_map = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: load_file(back / file) for file in set(weight_map.values())}
    assert len(shards) > 2 and {path.name for path in back.glob("*.safetensors")} == set(shards)
    assert_bit_equal({name: shards[file][name] for name, file in weight_map.items()}, tensors)
    assert (back / "generation_config.json").read_bytes() == generation.read_bytes()
    original = json.loads((tmp_path / "release" / "config.json").read_text())
    assert original.items() <= json.loads((back / "config.json").read_text()).items()


def test_heads_come_from_a_whisper_that_is_named(tmp_path):
    tiny_release(tmp_path)
    assert (
        read.read_omni2(tmp_path, GOLDENS / "whisper" / "tiny.pt").config.speech_encoder.heads == 4
    )


# ---- what training starts from: Qwen2.5 and Whisper as others publish them ----


@pytest.mark.parametrize("tied", [True, False])
def test_qwen(tied, tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=437,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0},
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(
                parameter
            )  # norms and biases are ones and zeros otherwise
    theirs.save_pretrained(tmp_path / "qwen", max_shard_size="60KB")
    assert (tmp_path / "qwen" / "model-00001-of-00003.safetensors").exists() or not tied
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "qwen" / name).symlink_to(OMNI2 / name)
    (tmp_path / "qwen" / "generation_config.json").write_text(
        '{"eos_token_id": [422, 420], "top_k": 20}'
    )
    assert convert("--qwen", tmp_path / "qwen", "--out", tmp_path / "ckpt") == 0

    assert parameters.parts(tmp_path / "ckpt") == ["llm"] and (
        "head.kernel" in parameters.stored(tmp_path / "ckpt", "llm")
    ) == (not tied)
    assert Omni2Config.load(tmp_path / "ckpt" / "config.json").tokens.text_eos == (422, 420)
    assert json.loads((tmp_path / "ckpt" / "generation_config.json").read_text())["top_k"] == 20
    assert tokenizer.load(tmp_path / "ckpt" / "tokenizer").encode("Hi") == tokenizer.load(
        OMNI2
    ).encode("Hi")
    ids = np.random.default_rng(1).integers(0, 437, (2, 9))
    llm = module(tmp_path / "ckpt").llm
    hidden, _ = llm(llm.embed(jnp.asarray(ids)), jnp.tile(jnp.arange(9), (2, 1)))
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(llm.logits(hidden), expected, rtol=0, atol=5e-4)


def test_hugging_face_whisper(tmp_path):
    config = transformers.WhisperConfig(
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=112,
        num_mel_bins=16,
        max_source_positions=50,
        vocab_size=97,
        decoder_layers=1,
        decoder_attention_heads=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.model.encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "conditional", max_shard_size="100KB")
    theirs.model.save_pretrained(tmp_path / "plain")
    mel = np.random.default_rng(1).standard_normal((2, 100, 16), np.float32)
    with torch.no_grad():
        expected = theirs.model.encoder(
            torch.tensor(mel.transpose(0, 2, 1))
        ).last_hidden_state.numpy()
    for name in ("conditional", "plain"):
        assert convert("--whisper", tmp_path / name, "--out", tmp_path / f"{name}-ckpt") == 0
        encoder = jax.jit(module(tmp_path / f"{name}-ckpt").speech_encoder)
        np.testing.assert_allclose(encoder(jnp.asarray(mel)), expected, rtol=0, atol=1e-4)


def test_openai_whisper_and_qwen_together(tmp_path):
    """The Whisper file holds float16, and its text decoder is dropped.

    The LLM's tensors are those of a release.
    """
    llm = {
        name: tensor
        for name, tensor in load_file(OMNI2 / "model.safetensors").items()
        if "speech_" not in name
    }
    (tmp_path / "qwen").mkdir()
    export.save_file(llm, tmp_path / "qwen" / "model.safetensors")
    stated = json.loads((OMNI2 / "config.json").read_text())
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(stated | {"model_type": "qwen2"}))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "qwen" / name).symlink_to(OMNI2 / name)
    assert (
        convert(
            "--whisper",
            GOLDENS / "whisper" / "tiny.pt",
            "--qwen",
            tmp_path / "qwen",
            "--out",
            tmp_path / "ckpt",
        )
        == 0
    )
    assert parameters.parts(tmp_path / "ckpt") == ["speech_encoder", "adapter", "llm"]
    weights = torch.load(GOLDENS / "whisper" / "tiny.pt", weights_only=True)["model_state_dict"]
    conv = stored(tmp_path / "ckpt")["speech_encoder.conv1.kernel"]
    assert conv.dtype == np.float16
    np.testing.assert_array_equal(conv, weights["encoder.conv1.weight"].numpy().transpose(2, 1, 0))


# ---- parts and voices of their own ----


def snapshot(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_parts_and_voices_are_added(tmp_path, checkpoint_dir):
    out = tmp_path / "ckpt"
    assert convert("--omni2", OMNI2, "--out", out) == 0
    assert parameters.parts(out) == list(LANGUAGE_PARTS)
    before = snapshot(out)
    np.save(tmp_path / "short.npy", np.zeros(7))
    refused = convert("--decoder", DECODER, "--voice", f"x={tmp_path / 'short.npy'}", "--out", out)
    assert "short.npy is not an x-vector of 192 finite numbers" in refused
    assert snapshot(out) == before and not (out / "voices").exists()

    assert convert("--decoder", DECODER, "--out", out) == 0
    assert parameters.parts(out) == parameters.parts(checkpoint_dir)
    assert (out / "config.json").read_bytes() == (checkpoint_dir / "config.json").read_bytes()
    np.save(tmp_path / "voice.npy", np.arange(192.0))
    assert convert("--voice", f"ann={tmp_path / 'voice.npy'}", "--out", out) == 0
    np.testing.assert_array_equal(
        np.load(out / "voices" / "ann.npy"), np.arange(192, dtype=np.float32)
    )

    before = snapshot(out)
    assert "has flow, vocoder, speaker already" in convert("--decoder", DECODER, "--out", out)
    assert "has speech_encoder already" in convert(
        "--whisper", GOLDENS / "whisper" / "tiny.pt", "--out", out
    )
    assert snapshot(out) == before


def test_decoder_without_speaker_encoder_and_with_a_stored_voice(tmp_path):
    """Dimensions may be given by reference in the yaml, and spk2info.pt brings voices along."""
    decoder = linked(DECODER, tmp_path / "decoder")
    (decoder / "campplus.onnx").unlink()
    replace(decoder / "spk2info.pt", b"")
    torch.save({"中文女": {"embedding": torch.arange(192.0)[None]}}, decoder / "spk2info.pt")
    out = tmp_path / "ckpt"
    assert convert("--decoder", decoder, "--out", out) == 0
    assert parameters.parts(out) == ["flow", "vocoder"] and voices.names(out) == ["中文女"]
    np.testing.assert_array_equal(np.load(out / "voices" / "中文女.npy"), np.arange(192))
    wav = GOLDENS / "audio" / "short_d.wav"
    assert "campplus.onnx was not converted" in convert("--voice", f"bob={wav}", "--out", out)
    assert voices.names(out) == ["中文女"]

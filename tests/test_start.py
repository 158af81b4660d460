"""What training starts from: two plain Qwen2.5 and a Whisper become one complete checkpoint."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from omni2_jax.checkpoint import parameters, tokenizer
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import LANGUAGE_PARTS, AdapterConfig, Omni2Config
from omni2_jax.configs import omni2_7b
from omni2_jax.convert import formats, read, safetensors_files, start
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.release import Release, combine
from omni2_jax.generate.omni2 import Omni2, Options
from omni2_jax.models.model import abstract_model
from tests.support.language_models import CASES, TEXT_TOKENS, edited, plain_qwen2
from tests.support.paths import GOLDENS
from tests.support.releases import convert, linked, manifest, replace, settings

OMNI2, DECODER, WHISPER = (
    GOLDENS / "omni2",
    GOLDENS / "cosy2_decoder",
    GOLDENS / "whisper" / "tiny.pt",
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return plain_qwen2(tmp_path_factory.mktemp("qwen") / "Qwen2.5-7B-Instruct", tied=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return plain_qwen2(
        tmp_path_factory.mktemp("small") / "Qwen2.5-0.5B", dtype=torch.float32, width=32, layers=1
    )


@pytest.fixture(scope="module")
def start_dir(qwen, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "start"
    assert convert("--whisper", WHISPER, "--qwen", qwen, "--speech-lm", small, "--out", out) == 0
    return out


def leaves(directory, part):
    return {path: leaf.read() for path, leaf in parameters.stored(directory, part).items()}


# ---- the checkpoint ----


def test_it_is_complete(start_dir):
    assert parameters.parts(start_dir) == list(LANGUAGE_PARTS)
    config = Omni2Config.load(start_dir / "config.json")
    assert dataclasses.astuple(config.tokens) == (TEXT_TOKENS, (422,), TEXT_TOKENS, 420)
    assert config.adapter == AdapterConfig() and (config.units, config.read, config.write) == (
        6561,
        3,
        10,
    )
    assert (config.llm.vocabulary, config.speech_lm.vocabulary) == (
        TEXT_TOKENS + 15,
        TEXT_TOKENS + 1 + 6561,
    )
    parameters.load(start_dir, config, jnp.float32)


def test_tokenizers_are_the_released_ones(start_dir, qwen):
    """Ids, texts and special tokens are those of the goldens, made by the released code."""
    for folder, released in {"tokenizer": OMNI2, "tts_tokenizer": OMNI2 / "tts_tokenizer"}.items():
        ours, theirs = tokenizer.load(start_dir / folder), tokenizer.load(released)
        assert ours.get_vocab() == theirs.get_vocab()
        assert {i: repr(token) for i, token in ours.added_tokens_decoder.items()} == {
            i: repr(token) for i, token in theirs.added_tokens_decoder.items()
        }
        for path in filter(
            Path.exists, (released / "tokenizer.json", released / "tokenizer_config.json")
        ):
            found, expected = (
                json.loads((start_dir / folder / path.name).read_text()),
                json.loads(path.read_text()),
            )
            assert {**found, "chat_template": None} == {**expected, "chat_template": None}
    found = tokenizer.load(start_dir / "tokenizer")
    for case in CASES["encode"]:
        assert found.encode(case["text"]) == case["ids"]
    for case in CASES["chat"]:
        assert (
            found.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False)
            == case["rendered"]
        )
    for case in CASES["units_decode"]:
        assert (
            tokenizer.load(start_dir / "tts_tokenizer").decode(
                case["ids"], skip_special_tokens=True
            )
            == case["text"]
        )
    assert (start_dir / "tokenizer" / "merges.txt").read_bytes() == (
        qwen / "merges.txt"
    ).read_bytes()


def test_language_models_keep_their_weights(start_dir, qwen, small):
    for part, directory in {"llm": qwen, "speech_lm": small}.items():
        theirs, ours = load_file(directory / "model.safetensors"), leaves(start_dir, part)
        table = theirs["model.embed_tokens.weight"]
        assert (
            ours["embedding.table"].dtype == table.dtype
            and ours["embedding.table"][:TEXT_TOKENS].tobytes() == table[:TEXT_TOKENS].tobytes()
        )
        np.testing.assert_array_equal(
            ours["layers.mlp.up.kernel"][0], theirs["model.layers.0.mlp.up_proj.weight"].T
        )
        assert ("head.kernel" in ours) == (part == "llm")
    assert len(leaves(start_dir, "llm")["embedding.table"]) == TEXT_TOKENS + 15


def test_new_rows_are_drawn_like_the_others(start_dir, qwen, small):
    table = leaves(start_dir, "speech_lm")["embedding.table"]
    old, new = table[:TEXT_TOKENS], table[TEXT_TOKENS:]
    assert new.shape == (6562, 32) and len(np.unique(new, axis=0)) == 6562
    np.testing.assert_allclose(new.mean(0), old.mean(0), atol=5 * old.std() / 6562**0.5)
    np.testing.assert_allclose(new.std(0), old.std(0), rtol=0.05)
    again = read.read_llm(qwen, small).params["speech_lm"]["embedding"]["table"]
    assert again.read().tobytes() == table.tobytes()


def test_adapter_and_fusion_are_initialised(start_dir):
    for part in ("adapter", "fusion"):
        found = leaves(start_dir, part)
        for path, leaf in found.items():
            assert leaf.dtype == np.float32
            if path.endswith("bias"):
                assert not leaf.any()
            else:
                np.testing.assert_allclose(leaf.std() * leaf.shape[0] ** 0.5, 1, rtol=0.06)
        config = Omni2Config.load(start_dir / "config.json")
        assert all(
            (leaf.read() == found[path]).all()
            for path, leaf in parameters.flatten(getattr(start, part)(config)).items()
        )


def test_round_trip_through_the_released_layout(start_dir, tmp_path):
    assert convert("--to-torch", start_dir, "--out", tmp_path / "back") == 0
    back = tmp_path / "back"
    assert convert("--omni2", back / "LLaMA-Omni2", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        start_dir / "config.json"
    ).read_bytes()
    for part in parameters.parts(start_dir):
        ours, theirs = leaves(start_dir, part), leaves(tmp_path / "again", part)
        assert ours.keys() == theirs.keys()
        assert all(
            leaf.dtype == theirs[path].dtype and leaf.tobytes() == theirs[path].tobytes()
            for path, leaf in ours.items()
        )
    for folder in ("tokenizer", "tts_tokenizer"):
        for file in (start_dir / folder).iterdir():
            assert (tmp_path / "again" / folder / file.name).read_bytes() == file.read_bytes()


def test_it_answers(start_dir):
    """Noise, but in the right format; the whole path is compiled for the tiny release elsewhere."""
    model = Omni2.load(start_dir, decoder=False)
    answer = model.answer(
        GOLDENS / "audio" / "short_d.wav", options=Options(max_new_tokens=5, max_flush_units=10)
    )
    assert len(answer.units) > 10 and answer.unit_text.startswith(f"<{answer.units[0]}>")


# ---- other sources ----


def test_without_a_speech_lm(qwen, tmp_path):
    """What stage 1a needs, in one go or one after the other."""
    assert convert("--whisper", WHISPER, "--qwen", qwen, "--out", tmp_path / "one") == 0
    assert convert("--qwen", qwen, "--out", tmp_path / "two") == 0
    assert parameters.parts(tmp_path / "two") == ["llm"]
    assert convert("--whisper", WHISPER, "--out", tmp_path / "two") == 0
    for directory in (tmp_path / "one", tmp_path / "two"):
        assert parameters.parts(directory) == ["speech_encoder", "adapter", "llm"]
        assert not (directory / "tts_tokenizer").exists()
        config = Omni2Config.load(directory / "config.json")
        assert (
            config.tokens.speech
            == tokenizer.load(directory / "tokenizer").get_vocab()["<speech>"]
            == TEXT_TOKENS
        )
        parameters.load(directory, config, jnp.float32)
    assert (tmp_path / "one" / "config.json").read_bytes() == (
        tmp_path / "two" / "config.json"
    ).read_bytes()
    one, two = (leaves(tmp_path / name, "adapter") for name in ("one", "two"))
    assert all(one[path].tobytes() == two[path].tobytes() for path in one)


def test_a_tokenizer_that_has_speech_is_kept(qwen, small, tmp_path):
    """Its files are as other versions of transformers write them: the template in its own file,
    special tokens described in full, no tokenizer.json.
    """
    other = linked(qwen, tmp_path / "qwen")
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        replace(other / name, (OMNI2 / name).read_bytes())
    (other / "tokenizer.json").unlink()
    content = json.loads((OMNI2 / "special_tokens_map.json").read_text())
    described = [
        {"content": token, "lstrip": False} for token in content["additional_special_tokens"]
    ]
    replace(
        other / "special_tokens_map.json",
        json.dumps(content | {"additional_special_tokens": described}),
    )
    content = json.loads((OMNI2 / "tokenizer_config.json").read_text())
    (other / "chat_template.jinja").write_text(content.pop("chat_template"))
    replace(other / "tokenizer_config.json", json.dumps(content))
    assert convert("--qwen", other, "--speech-lm", small, "--out", tmp_path / "start") == 0
    for file in (tmp_path / "start" / "tokenizer").iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()
    found, released = (
        tokenizer.load(tmp_path / "start" / "tts_tokenizer"),
        tokenizer.load(OMNI2 / "tts_tokenizer"),
    )
    assert found.get_vocab() == released.get_vocab() and found.eos_token_id == 420
    assert {i for i, token in found.added_tokens_decoder.items() if token.special} == {
        *range(420, 426)
    }
    described = json.loads(
        (tmp_path / "start" / "tts_tokenizer" / "special_tokens_map.json").read_text()
    )["additional_special_tokens"]
    assert described[-1] == "<sep>" and len(described) == 5
    assert Omni2Config.load(tmp_path / "start" / "config.json").tokens.sep == TEXT_TOKENS


def test_a_released_size(qwen, tmp_path, monkeypatch):
    """From shapes alone, with as many tokens as Qwen2.5 has: what comes out is what is released."""
    released = omni2_7b.config.only(*LANGUAGE_PARTS)
    keys = manifest("llama_omni2_7B")
    llm = {
        name: key
        for name, key in keys["keys"].items()
        if not name.startswith(("speech_generator.", "model.speech_"))
    }
    prefix = "speech_generator.model."
    speech_lm = {
        name.removeprefix(prefix): key
        for name, key in keys["keys"].items()
        if name.startswith(prefix)
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        speech_lm[name] = ([151936, 896], "bfloat16")
    stated = {
        "llm": keys["info"]["config"],
        "speech_lm": keys["info"]["speech_generator"] | {"vocab_size": 151936},
    }
    for part, dims in stated.items():
        (linked(qwen, tmp_path / part) / "generation_config.json").unlink()
        replace(
            tmp_path / part / "config.json",
            json.dumps(
                settings({"config": dims, "speech_generator": {}}) | {"model_type": "qwen2"}
            ),
        )
        replace(
            tmp_path / part / "tokenizer.json",
            qwen_sized(json.loads((qwen / "tokenizer.json").read_text())),
        )
        content = json.loads((qwen / "tokenizer_config.json").read_text())
        del content["added_tokens_decoder"], content["additional_special_tokens"]
        replace(tmp_path / part / "tokenizer_config.json", json.dumps(content))
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / part / name).unlink()
    monkeypatch.setattr(
        safetensors_files,
        "tensors",
        lambda path: formats.abstract(llm if path.parent.name == "llm" else speech_lm),
    )
    release = read.read_llm(tmp_path / "llm", tmp_path / "speech_lm")
    encoder = Release(
        EMPTY_CONFIG.replace(speech_encoder=released.speech_encoder),
        {"speech_encoder": {}},
    )
    release = combine([release, encoder])
    assert release.config == released
    shapes = abstract_model(released)[1]
    assert set(release.params) == set(shapes)
    for part in ("adapter", "llm", "fusion", "speech_lm"):
        found = parameters.flatten(release.params[part])
        assert {path: leaf.shape for path, leaf in found.items()} == {
            path: leaf.shape for path, leaf in parameters.flatten(shapes[part]).items()
        }


def qwen_sized(content):
    """A tokenizer.json of Qwen2.5's numbers: 151643 tokens, and 22 added ones."""
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"token {i}": i for i in range(len(vocabulary), 151643)}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|{i}|>" for i in range(19))]
    like = content["added_tokens"][0]
    return json.dumps(
        content
        | {
            "added_tokens": [
                like | {"id": 151643 + i, "content": name} for i, name in enumerate(names)
            ]
        }
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("rows", [900, 5000])
def test_extension_holds_one_table(dtype, rows):
    """Rows behind the kept ones are dropped, also where the new table is the smaller one."""
    old = np.random.default_rng(0).standard_normal((rows, 256)).astype(dtype)
    old[500:] = 1e4
    table = start.extended(LazyArray(old.shape, old.dtype, old.copy), kept=500, vocabulary=4000)
    tracemalloc.start()
    found = table.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.dtype == dtype and found.shape == table.shape == (4000, 256)
    assert (
        found[:500].tobytes() == old[:500].tobytes()
        and np.abs(found[500:].astype(np.float32)).max() < 10
    )
    assert abs(found[500:].astype(np.float32).std() - 1) < 0.02
    assert peak < max(old.nbytes, found.nbytes) + 8 * start.BLOCK * 256 * 2


# ---- bad input: one line, nothing written ----


def refused(tmp_path, *args):
    out = tmp_path / "out" / "start"
    message = convert(*args, "--out", out)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert not out.parent.exists()
    return message


def without(*keys):
    return lambda content: [content.pop(key) for key in keys]


def renamed(before, after):
    """A tokenizer_config.json in which an added token has another name."""
    return lambda content: [
        t.update(content=after)
        for t in content["added_tokens_decoder"].values()
        if t["content"] == before
    ]


FAULTS = {
    "no tokenizer": (
        "qwen",
        "tokenizer.json vocab.json",
        None,
        "Instruct has no tokenizer: expected tokenizer.json",
    ),
    "no tokenizer of the speech LM": (
        "small",
        "tokenizer.json vocab.json",
        None,
        "0.5B has no tokenizer: expected tokenizer.json",
    ),
    "no tokenizer_config": ("qwen", "tokenizer_config.json", None, "Instruct has no chat template"),
    "no chat template": (
        "qwen",
        "tokenizer_config.json",
        without("chat_template"),
        "Instruct has no chat template",
    ),
    "another tokenizer": (
        "small",
        "tokenizer_config.json",
        renamed("<|im_start|>", "<|start|>"),
        "differ in 2 tokens: '<|im_start|>' is 421 in the first",
    ),
    "ids left out": (
        "qwen",
        "tokenizer.json",
        lambda c: c["model"]["vocab"].pop("!"),
        "does not number its 424 tokens from 0 to 423",
    ),
    "too few rows": (
        "small",
        "config.json",
        lambda c: c.update(vocab_size=400),
        "vocab_size is 400, but the tokenizer has 425 tokens",
    ),
    "untied": (
        "small",
        "config.json",
        lambda c: c.update(tie_word_embeddings=False),
        "0.5B/config.json: the embeddings are not tied",
    ),
    "another model": (
        "small",
        "config.json",
        lambda c: c.update(model_type="llama"),
        "model_type is 'llama', expected 'qwen2'",
    ),
    "another width": (
        "small",
        "config.json",
        lambda c: c.update(hidden_size=64),
        "has shape [32], expected [64]",
    ),
    "a layer too many": (
        "small",
        "config.json",
        lambda c: c.update(num_hidden_layers=2),
        "missing model.layers.1.",
    ),
    "a layer left over": (
        "qwen",
        "config.json",
        lambda c: c.update(num_hidden_layers=1),
        "unexpected model.layers.1.",
    ),
    "no weights": ("small", "model.safetensors", None, "0.5B has neither model.safetensors nor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_sources_are_refused(fault, qwen, small, tmp_path):
    which, files, edit, says = FAULTS[fault]
    sources = {
        "qwen": linked(qwen, tmp_path / qwen.name),
        "small": linked(small, tmp_path / small.name),
    }
    for name in files.split():
        if edit:
            edited(sources[which] / name, edit)
        else:
            (sources[which] / name).unlink()
    assert says in refused(tmp_path, "--qwen", sources["qwen"], "--speech-lm", sources["small"])


def test_speech_lm_alone_is_refused(small, tmp_path):
    assert "--speech-lm needs --llm" in refused(tmp_path, "--speech-lm", small)
    assert "no/where does not exist" in refused(
        tmp_path, "--qwen", small, "--speech-lm", "no/where"
    )


@pytest.mark.parametrize(
    "name, says",
    [
        ("<speech>", "has <speech> as 423; expected it last, where <sep> goes"),
        ("<7>", "has <7> already"),
    ],
)
def test_a_tokenizer_without_room_for_units_is_refused(name, says, qwen, small, tmp_path):
    for source in (qwen, small):
        edited(
            linked(source, tmp_path / source.name) / "tokenizer_config.json",
            renamed("<|object_ref_start|>", name),
        )
    assert says in refused(
        tmp_path, "--qwen", tmp_path / qwen.name, "--speech-lm", tmp_path / small.name
    )

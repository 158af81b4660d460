"""Qwen3 as the LLM: converted, compared with transformers, prompted, trained and written back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import LANGUAGE_PARTS, DecoderConfig, Omni2Config
from omni2_jax.configs import stage1a
from omni2_jax.convert import families
from omni2_jax.convert.families import qwen3
from omni2_jax.convert.plan import unplan
from omni2_jax.models.model import SPEECH
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, OptimizerConfig
from tests.support.language_models import TEXT_TOKENS, THINKING, plain_qwen3
from tests.support.paths import GOLDENS
from tests.support.releases import convert
from tests.support.runs import toy_config

WHISPER = GOLDENS / "whisper" / "tiny.pt"


def leaves(directory, part):
    return {path: leaf.read() for path, leaf in parameters.stored(directory, part).items()}


@pytest.mark.parametrize(("tied", "option"), [(True, "--qwen"), (False, "--llm")])
def test_conversion(tied, option, tmp_path):
    """The forward pass equals transformers', and the table gives back every tensor bit for bit."""
    source, theirs = plain_qwen3(tmp_path / "Qwen3", tied)
    assert convert(option, source, "--out", tmp_path / "ckpt") == 0
    config = Omni2Config.load(tmp_path / "ckpt" / "config.json")
    assert config.llm == DecoderConfig(
        vocabulary=TEXT_TOKENS + 15,
        width=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=16,
        hidden=80,
        rope_theta=30000.0,
        tied=tied,
        qkv_bias=False,
        qk_norm=True,
    )
    stored = leaves(tmp_path / "ckpt", "llm")
    assert not any(path.endswith("bias") for path in stored)
    assert ("head.kernel" in stored) == (not tied)

    llm = nnx.merge(*parameters.load(tmp_path / "ckpt", config, jnp.float32)).llm
    ids = np.random.default_rng(1).integers(0, TEXT_TOKENS, (2, 9))
    positions = jnp.tile(jnp.arange(9), (2, 1))
    logits = nnx.jit(lambda llm, ids: llm.logits(llm(llm.embed(ids), positions)[0]))(llm, ids)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

    back = dict(unplan(qwen3.table(config.llm), stored.__getitem__))
    original = load_file(source / "model.safetensors")
    assert back.keys() - original.keys() == ({"lm_head.weight"} if tied else set())
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_reads_what_it_writes(name):
    family = families.FAMILIES[name]
    config = DecoderConfig(
        vocabulary=99,
        width=48,
        heads=4,
        kv_heads=1,
        head_size=12,
        hidden=7,
        tied=False,
        norm_eps=1e-5,
        rope_theta=500.0,
        max_positions=77,
        qkv_bias=name == "qwen2",
        qk_norm=name == "qwen3",
    )
    assert families.of_decoder(config) is family
    written = json.loads(json.dumps(family.write_config(config)))
    assert family.read_config(written, "config.json") == config


@pytest.fixture(scope="module")
def start_dir(tmp_path_factory):
    """The start of training: Whisper, a Qwen3 as the LLM, and a smaller one as the speech LM."""
    folder = tmp_path_factory.mktemp("start")
    large, _ = plain_qwen3(folder / "Qwen3-4B", tied=False)
    small, _ = plain_qwen3(folder / "Qwen3-0.6B", tied=True, width=32, layers=1)
    args = ("--whisper", WHISPER, "--llm", large, "--speech-lm", small)
    assert convert(*args, "--out", folder / "ckpt") == 0
    return folder / "ckpt"


def test_prompts_ask_for_answers_without_thinking(start_dir):
    config = Omni2Config.load(start_dir / "config.json")
    tokenizer = Tokenizer(start_dir, config, 300)
    thoughts = tokenizer.text.encode("<think>\n\n</think>\n\n")
    assert [tokenizer.text.decode([thoughts[0]]), config.tokens.speech] == [
        THINKING[0],
        TEXT_TOKENS + len(THINKING),
    ]
    prompt = tokenizer.prompt([1])
    assert prompt.count(SPEECH) == 300 and prompt[-len(thoughts) :] == thoughts
    # The next turn of a session: the answer's end, the user's turn, and empty thoughts again.
    following = tokenizer.continuation(1, ended=False)
    assert following[0] == 422 and following[-len(thoughts) :] == thoughts
    assert following.count(SPEECH) == 300 and tokenizer.text.decode(thoughts[:1]) == "<think>"
    # Earlier answers have no thoughts.
    whole = tokenizer.render([1, "Yes.", 1])
    assert whole.count("<think>") == 1 and "assistant\nYes.<|im_end|>" in whole


@pytest.mark.slow
def test_it_trains_in_stage_1a(start_dir, talks, tmp_path):
    """One step changes every kernel of the LLM and both of its norms per head, nothing else."""
    config = toy_config(
        stage1a.config,
        start_dir,
        talks,
        steps=1,
        batch=1,
        buckets=(Bucket(1, 400),),
        optimizer=OptimizerConfig(peak=1e-3, warmup=0),
    )
    Run(config, tmp_path / "run", jax.devices()[:1]).go()
    before, after = (leaves(path, "llm") for path in (start_dir, tmp_path / "run" / "final"))
    assert before.keys() == after.keys()
    changed = {path for path in before if np.any(before[path] != after[path])}
    for name in ("query.kernel", "key.kernel", "query_norm.scale", "key_norm.scale"):
        assert f"layers.attention.{name}" in changed
    assert all(np.isfinite(leaf).all() for leaf in after.values())
    for part in ("speech_encoder", "speech_lm"):
        kept, stored = leaves(start_dir, part), leaves(tmp_path / "run" / "final", part)
        assert all(stored[path].tobytes() == leaf.tobytes() for path, leaf in kept.items())


def test_the_released_layout_cannot_hold_it(start_dir, tmp_path):
    assert parameters.parts(start_dir) == list(LANGUAGE_PARTS)
    refused = convert("--to-torch", start_dir, "--out", tmp_path / "back")
    assert isinstance(refused, str) and "\n" not in refused
    assert f"{start_dir}: its llm is a Qwen3" in refused and "Qwen2.5 only" in refused
    assert list(tmp_path.iterdir()) == []

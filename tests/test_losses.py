"""Training losses against the released forward pass, and by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.models.model import SPEECH
from omni2_jax.train.examples import PAD
from omni2_jax.train.losses import IGNORE, token_loss
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages.base import positions
from omni2_jax.train.stages.speech_to_speech import reply_loss
from tests.support.networks import compiled


def test_training_batch(model, goldens):
    """A right-padded batch of one and two spoken turns: features, logits at the targets, and the
    mean loss.
    """
    golden = np.load(goldens / "omni2" / "train.npz")
    dialogues = json.loads((goldens / "omni2" / "train.json").read_text())["conversations"]
    speech = golden["speech_features"]  # of the three clips, in order
    clips = [turn["clip"] for dialogue in dialogues for turn in dialogue if "clip" in turn]
    for clip, features in zip(clips, speech, strict=True):
        np.testing.assert_allclose(
            model.hear(goldens / "audio" / f"{clip}.wav")[0], features, atol=1e-4, rtol=0
        )

    labels = golden["expanded_labels"]
    rows = labels.shape[1]
    ids = np.full((2, rows), PAD, np.int32)
    for i in range(2):
        prompt = golden["input_ids"][i][golden["attention_mask"][i] == 1]
        expanded = np.concatenate(
            [[SPEECH] * 300 if token == SPEECH else [token] for token in prompt]
        )
        ids[i, : len(expanded)] = expanded
    features = np.stack(
        [np.concatenate([speech[0], np.zeros_like(speech[0])]), np.concatenate(speech[1:])]
    )
    targets = np.pad(
        labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE
    )  # a row's target is the next row's label
    counted = targets != IGNORE
    np.testing.assert_array_equal(targets[counted], golden["targets"])

    def run(parts, ids, features, targets):
        hidden, _ = parts.llm(parts.embed_prompt(ids, features), positions(ids))
        # Whole, and in pieces that do not divide it.
        losses = [token_loss(hidden, targets, parts.llm.logits, block) for block in (rows, 100)]
        return parts.llm.logits(hidden), losses

    logits, losses = compiled(model, run, ids, features, targets)
    np.testing.assert_allclose(logits[counted], golden["logits_at_targets"], atol=1e-4, rtol=0)
    for total, terms in losses:
        assert terms == counted.sum()
        np.testing.assert_allclose(total / terms, golden["loss"][0], atol=1e-4, rtol=0)


def test_ignored_targets_carry_no_loss():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 7)), jnp.float32)
    targets = jnp.array([[3, 2, IGNORE, 5]])
    by_hand = -np.log(np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True))[
        [0, 1, 3], [3, 2, 5]
    ].sum()
    total, terms = token_loss(logits, targets, lambda x: x, block=3)
    np.testing.assert_allclose(total, by_hand, rtol=1e-6)
    assert terms == 3
    assert token_loss(logits, jnp.full((1, 4), IGNORE), lambda x: x) == (0, 0)


def test_logits_exist_for_a_block_only():
    """The compiled gradient has less temporary memory than a quarter of all logits [T, V]."""
    time, width, vocabulary = 512, 8, 4096
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    hidden = jax.ShapeDtypeStruct((1, time, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def loss(table, hidden, targets):
        return token_loss(hidden, targets, lambda x: x @ table.T, block=32)[0]

    compiled = jax.jit(jax.grad(loss)).lower(table, hidden, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < time * vocabulary * 4 / 4


def test_speech_loss_by_hand(model):
    """Stage 2 on one reply, against its rows put together one by one: fused text, <sep>, units."""
    sep, unit_eos = model.config.tokens.sep, model.config.tokens.unit_eos
    tokens = jnp.array([[7, 8, 9, sep, 500, 501, PAD]])
    targets = jnp.array([[IGNORE, IGNORE, IGNORE, 500, 501, unit_eos, IGNORE]])
    source = jnp.array([[4, 5, 6, PAD, PAD, PAD, PAD]])
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((1, 10, model.config.llm.width)), jnp.float32)
    batch = {"tokens": tokens[None], "targets": targets[None], "source": source[None]}
    train = TrainConfig(stage="2", dtype="float32", remat="none")

    def run(parts, hidden, batch):
        rows = [parts.fuse(hidden[0, at], tokens[0, i]) for i, at in enumerate((4, 5, 6))] + [
            parts.speech_lm.embed(t) for t in tokens[0, 3:6]
        ]
        states, _ = parts.speech_lm(jnp.stack(rows)[None], jnp.arange(6)[None])
        chances = jax.nn.log_softmax(parts.speech_lm.logits(states)[0])
        return chances, reply_loss(parts, train, hidden, batch)

    chances, (total, terms) = compiled(model, run, hidden, batch)
    by_hand = -(chances[3, 500] + chances[4, 501] + chances[5, unit_eos])
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)
    assert terms == 3

"""The training side against the released forward pass: a right-padded batch, one and two spoken turns."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.model import SPEECH
from train.losses import IGNORE, next_token_loss


def test_training_batch(model, goldens):
    golden = np.load(goldens / "omni2" / "train.npz")
    dialogues = json.loads((goldens / "omni2" / "train.json").read_text())["conversations"]
    parts = nnx.merge(model.graph, model.params)
    heard = golden["speech_features"]  # of the three clips, in order
    clips = [turn["clip"] for dialogue in dialogues for turn in dialogue if "clip" in turn]
    for clip, features in zip(clips, heard, strict=True):
        np.testing.assert_allclose(model.hear(goldens / "audio" / f"{clip}.wav")[0], features, atol=1e-4, rtol=0)

    labels, valid = golden["expanded_labels"], golden["expanded_attention_mask"] == 1
    rows = labels.shape[1]
    ids = np.zeros((2, rows), np.int32)
    for i in range(2):
        given = golden["input_ids"][i][golden["attention_mask"][i] == 1]
        expanded = np.concatenate([[SPEECH] * 300 if token == SPEECH else [token] for token in given])
        ids[i, : len(expanded)] = expanded
    features = np.stack([np.concatenate([heard[0], np.zeros_like(heard[0])]), np.concatenate(heard[1:])])
    positions = jnp.where(valid, jnp.arange(rows)[None], -1)
    hidden, _ = parts.llm(parts.embed_prompt(jnp.asarray(ids), jnp.asarray(features)), positions)
    logits = parts.llm.logits(hidden)

    targets = labels[:, 1:] != IGNORE
    np.testing.assert_array_equal(labels[:, 1:][targets], golden["targets"])
    np.testing.assert_allclose(logits[:, :-1][targets], golden["logits_at_targets"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(next_token_loss(logits, jnp.asarray(labels)), golden["loss"][0], atol=1e-4, rtol=0)


def test_ignored_labels_carry_no_loss():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 7)), jnp.float32)
    labels = jnp.array([[3, 2, IGNORE, 5]])
    expected = -(np.log(np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True))[[0, 2], [2, 5]]).mean()
    np.testing.assert_allclose(next_token_loss(logits, labels), expected, rtol=1e-6)
    assert next_token_loss(logits, jnp.full((1, 4), IGNORE)) == 0

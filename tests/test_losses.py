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
    rows, heard = golden["expanded_labels"].shape[1], []
    ids = np.zeros((2, rows), np.int32)
    for i, dialogue in enumerate(dialogues):
        given = golden["input_ids"][i][golden["attention_mask"][i] == 1]
        expanded = np.concatenate([[SPEECH] * 300 if token == SPEECH else [token] for token in given])
        ids[i, : len(expanded)] = expanded
        clips = [model.hear(goldens / "audio" / f"{turn['clip']}.wav")[0] for turn in dialogue if "clip" in turn]
        heard.append(jnp.pad(jnp.concatenate(clips), ((0, 600 - 300 * len(clips)), (0, 0))))

    valid = golden["expanded_attention_mask"] == 1
    positions = jnp.where(valid, jnp.arange(rows)[None], -1)
    hidden, _ = parts.llm(parts.embed_prompt(jnp.asarray(ids), jnp.stack(heard)), positions)
    logits, labels = parts.llm.logits(hidden), golden["expanded_labels"]

    for row in range(2):
        np.testing.assert_allclose(hidden[row][valid[row]], golden[f"last_hidden_row{row}"][valid[row]], atol=1e-4, rtol=0)
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

"""Stage 1a with text replayed, and with a CTC loss of what the adapter heard."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config, TokenConfig
from omni2_jax.configs import stage1a, stage1b
from omni2_jax.models.model import abstract_model
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.loader import catalogue
from omni2_jax.train.data.records import Turn
from omni2_jax.train.examples import PAD
from omni2_jax.train.losses import IGNORE
from omni2_jax.train.settings import Bucket
from omni2_jax.train.stages import stage_of
from omni2_jax.train.stages.speech_to_text import TextExamples, hearing_loss
from tests.support.runs import toy_config

BUCKET = Bucket(6, 400)


@pytest.fixture(scope="module")
def examples(new_checkpoint, talks, tmp_path_factory):
    """Examples of stage 1a with so many texts to replay."""
    config = Omni2Config.load(new_checkpoint / "config.json")
    tokenizer = Tokenizer(new_checkpoint, config, config.speech_positions)

    def examples(count: int, **changes) -> TextExamples:
        path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
        turns = [{"question": "name the capital", "reply": "it has colours"}]
        lines = [{"id": str(i), "split": "seen", "topic": "", "turns": turns} for i in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes = {"replay": 0.4, "replay_data": str(path), "buckets": (BUCKET,)} | changes
        train = toy_config(stage1a.config, new_checkpoint, talks, **changes)
        return stage_of(train).examples(config, tokenizer, Dataset(talks), "data")

    return examples


@pytest.mark.parametrize("count, spoken, texts", [(1, 2, 1), (3, 4, 3), (40, 60, 40)])
def test_the_share_of_text(examples, count, spoken, texts):
    """Of two dialogues and so many texts the larger set is used once, the other one repeated."""
    rows = examples(count)
    items = [item for index in range(len(rows)) for item in rows.items(index)]
    numbers = [item.dialogue for item in items]
    assert sum(number >= 0 for number in numbers) == spoken
    assert sum(number < 0 for number in numbers) == texts
    assert {-1 - number for number in numbers if number < 0} == set(range(min(count, texts)))


def test_names_of_rows(examples):
    """Messages name a dialogue by its own data set, however often that is repeated."""
    rows = examples(3)
    names = [rows.name(index) for index in range(len(rows))]
    assert names[:4] == ["dialogue 0", "dialogue 1"] * 2
    assert names[4:] == [f"dialogue {number} of {rows.texts.path}" for number in range(3)]


def test_a_text_is_a_row_without_speech(examples):
    rows = examples(1)
    (item,) = rows.items(len(rows) - 1)
    row = rows.row(item, BUCKET)
    tokenizer = rows.tokenizer
    spelled = "<|im_start|>user\nname the capital<|im_end|>\n<|im_start|>assistant\n"
    ids = row["ids"][row["ids"] != PAD]
    assert tokenizer.text.decode(ids) == f"{spelled}it has colours<|im_end|>"
    targets = row["targets"][row["targets"] != IGNORE]
    assert tokenizer.text.decode(targets) == "it has colours<|im_end|>"
    first = np.flatnonzero(row["targets"] != IGNORE)[0]
    assert row["ids"][first + 1] == targets[0] and not row["audio"].any()
    assert item.size == Bucket(0, len(ids), 0)


def test_rows_of_text_alone_have_a_loss(examples, new_checkpoint):
    """In a bucket without segments nothing is heard, and the CTC loss has nothing to say."""
    bucket = Bucket(0, 64)
    rows = examples(1, ctc=0.3, buckets=(bucket, BUCKET))
    (item,) = rows.items(len(rows) - 1)
    batch = {name: value[None] for name, value in rows.row(item, bucket).items()}
    stage = stage_of(rows.train)
    config = Omni2Config.load(new_checkpoint / "config.json").only(
        "speech_encoder", "adapter", "llm"
    )
    graph, shapes = abstract_model(config)

    def loss(params, batch):
        return stage.loss(nnx.merge(graph, params), batch, jax.random.key(0))[0]

    assert batch["question"].size == 0
    assert jax.eval_shape(loss, shapes, batch).shape == ()


def test_first_the_adapter_learns_without_the_llm(examples, new_checkpoint):
    """In the steps of `ctc_steps` questions change the adapter and the embeddings that it is
    compared with, and nothing else; replayed text changes the LLM."""
    text_bucket = Bucket(0, 64)
    rows = examples(1, ctc=0.3, ctc_steps=2, buckets=(text_bucket, BUCKET))
    stage = stage_of(rows.train)
    assert [stage.phase(number) for number in range(4)] == ["ctc", "ctc", "", ""]
    config = Omni2Config.load(new_checkpoint / "config.json")
    graph, shapes = abstract_model(config.only("speech_encoder", "adapter", "llm"))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
    )

    @jax.jit
    def gradient_norms(batch):
        def loss(params):
            return stage.loss_in("ctc")(nnx.merge(graph, params), batch, jax.random.key(0))[0]

        grads = jax.grad(loss)(params)
        table = optax.tree.norm(grads["llm"].pop("embedding"))
        return {"table": table} | {name: optax.tree.norm(grads[name]) for name in stage.trained}

    def batch(index: int, bucket: Bucket) -> dict:
        (item,) = rows.items(index)
        return {name: value[None] for name, value in rows.row(item, bucket).items()}

    spoken = gradient_norms(batch(0, BUCKET))
    assert spoken["adapter"] > 0 and spoken["table"] > 0 and spoken["llm"] == 0
    text = gradient_norms(batch(len(rows) - 1, text_bucket))
    assert text["adapter"] == 0 and text["llm"] > 0


def test_labels_are_the_questions_that_take_one_segment(examples, talks):
    rows = examples(1, ctc=0.3)
    for index in range(2):
        (item,) = rows.items(index)
        row, dialogue = rows.row(item, BUCKET), Dataset(talks).dialogue(index)
        segments = [-(-turn.samples // 32_000) for turn in dialogue.turns[::2]]
        starts = np.cumsum([0, *segments])
        for turn, start, count in zip(dialogue.turns[::2], starts, segments, strict=False):
            ids = rows.tokenizer.text.encode(turn.text)
            is_label = count == 1 and len(ids) <= 20
            expected = ids if is_label else []
            label = row["question"][start]
            np.testing.assert_array_equal(label[label != PAD], expected)


def test_speech_in_a_text_is_no_place_for_speech(examples):
    """Neither in a reply nor, where it is the CTC loss's blank, in the text of a question."""
    rows = examples(1, ctc=0.3)
    speech, text = rows.config.tokens.speech, "Say <speech> twice."
    assert speech in rows.tokenizer.text.encode(text)
    ids = rows.encode(Turn("assistant", text))
    assert speech not in ids and rows.tokenizer.decode(ids) == text
    dialogue = rows.data.dialogue(0)
    question, *others = dialogue.turns
    question = dataclasses.replace(question, text="<speech>?")
    row, conversation = rows.empty(BUCKET), rows.conversation(dialogue)
    rows.fill_labels(row, dataclasses.replace(dialogue, turns=(question, *others)), conversation)
    label = row["question"][0]
    assert rows.tokenizer.decode(label[label != PAD]) == "<speech>?" and speech not in label


def test_a_question_whose_words_are_not_known(examples, monkeypatch):
    """VocalNet's: it is no label, and its dialogue is left out of what is replayed, by name."""
    rows = examples(1, ctc=0.3)
    dialogue = rows.data.dialogue(0)
    question, *others = dialogue.turns
    unwritten = dataclasses.replace(
        dialogue, turns=(dataclasses.replace(question, text="<speech>"), *others)
    )
    labels = {}
    for one in (dialogue, unwritten):
        row = rows.empty(BUCKET)
        rows.fill_labels(row, one, rows.conversation(one))
        labels[one] = row["question"]
    assert (labels[dialogue][0] != PAD).any() and (labels[unwritten][0] == PAD).all()
    np.testing.assert_array_equal(labels[unwritten][1:], labels[dialogue][1:])
    monkeypatch.setattr(rows.texts, "dialogue", lambda index: unwritten)
    measured = catalogue(rows, range(len(rows)), (BUCKET,), strict=False)
    reason = "the words of a question are not known, its text is <speech>"
    assert measured.skipped == {f"dialogue 0 of {rows.texts.path}": reason}


def test_hearing_loss_compares_features_with_embeddings():
    """Features that are the embeddings of a text and blanks spell it; others do not."""
    table = 20.0 * jnp.eye(6)
    model = SimpleNamespace(
        llm=SimpleNamespace(embedding=SimpleNamespace(table=table)),
        config=SimpleNamespace(tokens=TokenConfig(speech=5)),
    )
    spelled = jnp.eye(6)[jnp.array([[5, 2, 2, 5, 3, 5], [1, 1, 1, 1, 1, 1]])][None]
    speech = spelled.reshape(1, 12, 6)  # one row of two segments

    of_question = jax.jit(lambda question: hearing_loss(model, speech, question))

    def loss(*labels: list[int]) -> float:
        question = [[label + [PAD] * (6 - len(label)) for label in labels]]
        total, tokens = of_question(jnp.array(question))
        assert tokens == sum(map(len, labels))
        return float(total / jnp.maximum(tokens, 1))

    assert loss([2, 3], [1]) < 1e-6
    assert loss([2, 3], []) < 1e-6  # a segment without a label does not count
    assert loss([2, 4], []) == pytest.approx(10, rel=0.01)  # 20 for one wrong token of two
    assert loss([], []) == 0


def test_settings(new_checkpoint, talks):
    train = toy_config(stage1a.config, new_checkpoint, talks)
    for change, message in {
        "replay=1.0": "replay is 1.0, expected at least 0 and less than 1",
        "ctc=-0.1": "ctc is -0.1, expected at least 0",
    }.items():
        name, value = change.split("=")
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(train, **{name: float(value)})
    with pytest.raises(ValueError, match="replay_data is given, but replay is 0"):
        dataclasses.replace(train, replay_data="texts.jsonl")
    with pytest.raises(ValueError, match="ctc_steps is given, but ctc is 0"):
        dataclasses.replace(train, ctc_steps=10)
    with pytest.raises(ValueError, match="ctc is for stage 1a; stage 1b does not use it"):
        dataclasses.replace(stage1b.config, ctc=0.5)

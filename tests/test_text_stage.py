"""Stage "text": packed rows, each dialogue for itself, and the share of right replies."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.configs import text
from omni2_jax.models.model import Model
from omni2_jax.train.data.loader import catalogue
from omni2_jax.train.data.texts import Texts
from omni2_jax.train.examples import PAD
from omni2_jax.train.loop import Run
from omni2_jax.train.losses import IGNORE
from omni2_jax.train.packing import pack
from omni2_jax.train.settings import Bucket
from omni2_jax.train.stages.text import Text, WrittenExamples, count_replies
from tests.support.networks import fresh_model
from tests.support.runs import toy_config

SUMS = {"one": 1, "two": 2, "three": 3}


def dialogue(number: int, split: str, *turns: tuple[str, str]) -> dict:
    return {
        "id": str(number),
        "split": split,
        "topic": "sums",
        "turns": [
            {"question": question, "reply": reply, "topic": "more" if i else ""}
            for i, (question, reply) in enumerate(turns)
        ],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Nine dialogues of one or two turns; two of them are of another split than "seen"."""
    names = list(SUMS)
    lines = []
    for number in range(9):
        a, b = names[number // 3], names[number % 3]
        turns = [(f"what is {a} and {b}", f"{a} and {b} it is {SUMS[a] + SUMS[b]}.")]
        turns += [("please say that", f"{SUMS[a] + SUMS[b]}.")] if number % 2 else []
        lines.append(dialogue(number, "unseen_values" if number > 6 else "seen", *turns))
    path = tmp_path_factory.mktemp("written") / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def examples(new_checkpoint, written) -> WrittenExamples:
    config = Omni2Config.load(new_checkpoint / "config.json")
    tokenizer = Tokenizer(new_checkpoint, config, 0)
    train = toy_config(text.config, new_checkpoint, written, buckets=(Bucket(0, 160),))
    return WrittenExamples(train, config, tokenizer, Texts(written, "data"))


def test_packing_fills_rows():
    sizes = [*np.random.default_rng(0).integers(1, 60, 500).tolist(), 101, 100]
    rows = pack(sizes, 100)
    assert sorted(index for row in rows for index in row) == [*range(500), 501]
    assert all(sum(sizes[index] for index in row) <= 100 for row in rows)
    assert len(rows) <= 1.02 * sum(sizes[:500]) / 100 + 2


def test_splits(written, tmp_path):
    assert len(Texts(written, "data")) == 7 and len(Texts(written, "validation")) == 2
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(json.dumps(dialogue(0, "unseen_both", ("a", "b"))) + "\n")
    with pytest.raises(ValueError, match=r"unseen.jsonl has no dialogue of the split 'seen'"):
        Texts(unseen, "data")
    with pytest.raises(ValueError, match=r"none.jsonl does not exist"):
        Texts(tmp_path / "none.jsonl", "data")


def test_a_row_has_dialogues_as_the_chat_template_spells_them(examples):
    row = examples.row(examples.items(0)[0], Bucket(0, 160))
    tokenizer = examples.tokenizer.text
    for number, index in enumerate(examples.rows[0]):
        place = row["dialogue"] == number
        turns = [turn.text for turn in examples.data.dialogue(index).turns]
        spelled = "".join(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>"
            + "\n" * (2 * i + 2 < len(turns))
            for i, (question, reply) in enumerate(zip(turns[::2], turns[1::2], strict=True))
        )
        assert tokenizer.decode(row["ids"][place]) == spelled
        np.testing.assert_array_equal(row["positions"][place], np.arange(place.sum()))
        replies = [
            row["targets"][place & (row["reply"] == r)] for r in range(row["reply"].max() + 1)
        ]
        spoken = [tokenizer.decode(reply) for reply in replies if len(reply)]
        assert spoken == [f"{reply}<|im_end|>" for reply in turns[1::2]]
    assert (row["ids"] == PAD).sum() == 160 - sum(row["dialogue"] != PAD)


def test_rows_are_named_by_their_dialogues(examples):
    """Messages do not take the number of a row for that of a dialogue."""
    lengths = [len(one.ids) for one in examples.written]
    capacity = min(lengths)
    short = dataclasses.replace(examples.train, buckets=(Bucket(0, capacity),))
    alone = WrittenExamples(short, examples.config, examples.tokenizer, examples.data)
    measured = catalogue(alone, range(len(alone)), short.buckets, strict=False)
    left_out = {f"dialogue {n}" for n, length in enumerate(lengths) if length > capacity}
    assert measured.skipped.keys() == left_out != set()
    assert [examples.name(n) for n, row in enumerate(examples.rows) if len(row) > 1] == [
        f"dialogues {', '.join(map(str, row))}" for row in examples.rows if len(row) > 1
    ]


def test_a_dialogue_sees_itself_alone(examples):
    """The loss of packed rows is the sum of the losses of single ones."""
    stage, config = Text(examples.train), examples.config.only("llm")
    graph, params = fresh_model(lambda rngs: Model(config, rngs))

    @jax.jit
    def loss(batch: dict) -> tuple[jax.Array, jax.Array]:
        return stage.loss(nnx.merge(graph, params), batch, jax.random.key(0))

    row = examples.row(examples.items(0)[0], Bucket(0, 160))
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    total, terms = loss(batch)
    alone = []
    for number in range(len(examples.rows[0])):
        place = np.flatnonzero(row["dialogue"] == number)
        single = {name: jnp.full((1, 160), PAD) for name in batch}
        single["targets"] = jnp.full((1, 160), IGNORE)
        single = {
            name: value.at[0, : len(place)].set(row[name][place]) for name, value in single.items()
        }
        alone.append(loss(single))
    assert len(alone) > 1 and terms == sum(count for _, count in alone)
    np.testing.assert_allclose(total, sum(single for single, _ in alone), rtol=1e-5)


def test_right_replies_are_counted_by_their_tokens():
    reply = jnp.array([[PAD, 0, 0, 1, 1, 1, PAD, 2]])
    hits = jnp.array([[False, True, True, True, False, True, False, True]])
    replies, right = count_replies(reply, hits)
    np.testing.assert_array_equal(replies[0], [True] * 3 + [False] * 5)
    np.testing.assert_array_equal(right[0], [True, False, True] + [False] * 5)


@pytest.mark.slow
def test_it_learns_the_replies(new_checkpoint, written, tmp_path):
    """Of an unseen sum nothing is known; all of "data" is learnt by heart."""
    train = toy_config(
        text.config,
        new_checkpoint,
        written,
        validation=str(written),
        batch=8,
        steps=60,
        validate_every=30,
        buckets=(Bucket(0, 160),),
    )
    Run(train, tmp_path / "run").go()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.1 * losses[0]
    measured = [line for line in lines if "right" in line]
    assert len(measured) == 2 and {"right/topic/sums", "right/split/unseen_values"} <= {
        *measured[0]
    }

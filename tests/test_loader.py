"""The rows of a step follow from seed and step alone; the arrays of each stage by hand."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from omni2_jax import sharding
from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.models.model import SPEECH
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.loader import (
    EMPTY_ROW,
    Loader,
    Source,
    catalogue,
    filled,
    local_rows,
    schedule,
)
from omni2_jax.train.data.records import Dialogue, Turn, encode_clip
from omni2_jax.train.data.writer import Writer
from omni2_jax.train.dialogues import speech_positions
from omni2_jax.train.examples import PAD
from omni2_jax.train.layout import arrange
from omni2_jax.train.losses import IGNORE
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages import stage_of
from tests.support.dialogues import pcm, spoken

RANDOM = np.random.default_rng(0)
TEXTS = [
    "No.",
    "Yes, tea is good.",
    "Cats have four legs.",
    "The sea is blue.",
    "Bake flour and water.",
    "One two three four five six.",
]
SHORT, LONG = Bucket(0, 0, 48), Bucket(0, 0, 96)
TRAIN = TrainConfig(stage="1b", batch=4, steps=9, buckets=(SHORT, LONG), workers=2)


QUESTIONS = [pcm(RANDOM, 800 + i) for i in range(9)]
REPLIES = [pcm(RANDOM, 960 * 20) for _ in range(9)]


def talk(name: str, *numbers: int) -> tuple[Dialogue, list[bytes]]:
    """A dialogue of these questions and replies."""
    turns, clips = [], []
    for number in numbers:
        text, units = (
            TEXTS[number % len(TEXTS)],
            RANDOM.integers(0, 6561, 10 + 5 * number, np.int32),
        )
        turns += [("hi", None, QUESTIONS[number]), (text, units, REPLIES[number])]
        clips += [
            encode_clip(QUESTIONS[number] / 32768, 16000),
            encode_clip(REPLIES[number] / 32768, 24000),
        ]
    return spoken(name, turns), clips


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Seven dialogues of one turn and, the last, one of two."""
    path = tmp_path_factory.mktemp("data") / "set"
    with Writer(path) as writer:
        for i in range(7):
            writer.add(*talk(f"d{i}", i))
        writer.add(*talk("two", 7, 8))
    return path


@pytest.fixture(scope="module")
def config(checkpoint_dir) -> Omni2Config:
    return Omni2Config.load(checkpoint_dir / "config.json")


@pytest.fixture(scope="module")
def tokenizer(checkpoint_dir, config) -> Tokenizer:
    return Tokenizer(checkpoint_dir, config, 300)


@pytest.fixture(scope="module")
def plan(path, config, tokenizer):
    """Examples, catalogue and schedule of some settings."""

    def make(train: TrainConfig = TRAIN, path: Path = path):
        examples = stage_of(train).examples(config, tokenizer, Dataset(path), "data")
        measured = catalogue(examples, range(len(examples.data)), train.buckets, train.strict)
        return examples, measured, schedule(measured, train)

    return make


def changed(**changes) -> TrainConfig:
    return dataclasses.replace(TRAIN, **changes)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# --- the order


def order(batches) -> list[tuple]:
    return [(batch.bucket, *batch.rows.tolist()) for batch in batches]


def test_rows_follow_from_seed_and_step(plan):
    """They do not depend on the number of steps, nor on how these are computed."""
    expected = order(plan()[2])
    assert len(expected) == 9 and {bucket for bucket, *_ in expected} == {SHORT, LONG}
    assert order(plan(changed(workers=1, microbatches=2, remat="none"))[2]) == expected
    assert order(plan(changed(steps=30))[2])[:9] == expected
    assert order(plan(changed(steps=None, epochs=9))[2])[:9] == expected
    assert order(plan(changed(seed=1))[2]) != expected


def test_every_example_once_an_epoch(plan):
    _, measured, batches = plan(changed(steps=None, epochs=3))
    rows = np.concatenate([batch.rows for batch in batches])
    assert Counter(rows[rows != EMPTY_ROW].tolist()) == dict.fromkeys(range(9), 3)
    for batch in batches:
        sizes = {measured.items[row].size.tokens for row in batch.rows if row != EMPTY_ROW}
        assert max(sizes) <= batch.bucket.tokens and (
            batch.bucket == SHORT or min(sizes) > SHORT.tokens
        )
    rows = np.concatenate(
        [batch.rows for batch in plan(changed(batch=3, steps=None, epochs=3, buckets=(LONG,)))[2]]
    ).reshape(3, 9)
    assert [sorted(epoch) for epoch in rows.tolist()] == [list(range(9))] * 3
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


@pytest.mark.parametrize("epochs, examples", [(0.5, 5), (0.01, 1), (1.5, 14)])
def test_part_of_an_epoch(plan, epochs, examples):
    rows = np.concatenate([batch.rows for batch in plan(changed(steps=None, epochs=epochs))[2]])
    assert np.count_nonzero(rows != EMPTY_ROW) == examples


def test_fewer_examples_than_rows(plan):
    batches = plan(changed(batch=32, steps=2, buckets=(LONG,)))[2]
    assert [len(batch.rows) for batch in batches] == [32, 32]
    assert set(batches[0].rows) == set(range(9))


def test_padding(plan):
    """Two buckets, by hand."""
    _, measured, batches = plan(changed(batch=2, steps=2))
    sizes = [measured.items[row].size.tokens for batch in batches for row in batch.rows]
    assert filled(measured, batches) == sum(sizes) / (
        2 * sum(batch.bucket.tokens for batch in batches)
    )
    _, measured, (batch,) = plan(
        TrainConfig("2", batch=16, epochs=1, buckets=(Bucket(2, 800, 100),))
    )
    used = sum(
        item.size.positions + item.size.segments * item.size.tokens for item in measured.items
    )
    assert filled(measured, [batch]) == used / (16 * (800 + 2 * 100))


# --- cut over processes, devices and microbatches


def test_rows_of_processes(plan):
    """The rows of all processes, put together, are the batch."""
    for train in (TRAIN, changed(microbatches=2)):
        examples, measured, batches = plan(train)
        size = train.batch // train.microbatches
        whole = Source(examples, measured, batches, slice(0, size))
        parts = [
            Source(examples, measured, batches, slice(start, start + size // 2))
            for start in (0, size // 2)
        ]
        for step in range(len(batches)):
            joined = {
                name: np.concatenate([part[step][name] for part in parts], axis=1)
                for name in ("tokens", "targets")
            }
            assert same(joined, whole[step])
            assert joined["tokens"].shape == (train.microbatches, size, batches[step].bucket.tokens)


def test_microbatches_are_the_same_rows(plan):
    one, two = (Source(*plan(changed(microbatches=n)), slice(0, 4 // n)) for n in (1, 2))
    for step in range(9):
        assert same(
            {name: value[0] for name, value in one[step].items()},
            {name: np.concatenate(v) for name, v in two[step].items()},
        )


def test_local_rows():
    """From the slices of its devices, which may be parts, copies of each other, or everything."""

    def held(*slices: slice) -> SimpleNamespace:
        indices = dict(enumerate((part,) for part in slices))
        return SimpleNamespace(addressable_devices_indices_map=lambda _: indices)

    assert local_rows(held(slice(4, 6), slice(6, 8)), 8) == slice(4, 8)
    assert local_rows(held(slice(0, 4), slice(0, 4)), 8) == slice(0, 4)
    assert local_rows(held(slice(None), slice(None)), 8) == slice(0, 8)


def alone() -> NamedSharding:
    return NamedSharding(
        sharding.make_mesh(devices=jax.devices()[:1]), PartitionSpec(sharding.RULES["batch"])
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_start_at_a_step(plan, workers):
    """The batches are those of a loader that started at 0, and end with the last one."""
    loader = Loader(*plan(changed(workers=workers, microbatches=2)), alone())
    batches = list(loader.start(0))
    assert len(batches) == 9
    for on_device, on_host in batches:
        assert same(on_device, on_host) and all(
            isinstance(value, jax.Array) for value in on_device.values()
        )
    for step in (0, 1, 5, 9):
        again = list(loader.start(step))
        assert len(again) == 9 - step
        assert all(same(a, b) for (a, _), (b, _) in zip(again, batches[step:], strict=True))


def test_a_batch_that_the_mesh_does_not_divide(plan):
    mesh = AbstractMesh((2, 4, 2), sharding.AXES)
    for train, expected in (
        (changed(batch=12), "a batch of 16 can"),
        (changed(batch=16, microbatches=4), "a batch of 32 can"),
    ):
        with pytest.raises(
            ValueError,
            match="cannot be cut over the 8 devices of the mesh's replica and fsdp axes; "
            + expected
            + "$",
        ):
            Loader(*plan(train), sharding.row_sharding(mesh))


# --- padding has no loss


def test_empty_rows_carry_no_loss(plan, checkpoint_dir, config):
    """They change neither the sum of the loss nor its terms, and all gradients are finite."""
    examples, measured, batches = plan(changed(steps=None, epochs=1, buckets=(LONG,)))
    assert batches[-1].rows[1:].tolist() == [EMPTY_ROW] * 3
    row = Source(examples, measured, batches, slice(0, 4))[2]
    batch = {name: jnp.asarray(value[0]) for name, value in row.items()}
    assert (batch["tokens"][1:] == PAD).all() and (batch["targets"][1:] == IGNORE).all()
    graph, params = parameters.load(checkpoint_dir, config.only("speech_lm"), jnp.float32)
    stage = stage_of(changed(dtype="float32"))

    def loss(params, batch):
        return stage.loss(nnx.merge(graph, params), batch, jax.random.key(0))

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, terms), grads = compute(params, batch)
    (four, fourfold), _ = compute(
        params, {name: jnp.tile(value[:1], (4, 1)) for name, value in batch.items()}
    )
    assert 4 * terms == fourfold == 4 * np.count_nonzero(row["targets"] != IGNORE) > 0
    np.testing.assert_allclose(4 * total, four, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("stage", ["1a", "1b", "2", "flow"])
def test_an_empty_row_is_shaped_as_others(plan, stage):
    train = TrainConfig(stage, batch=9, epochs=1, buckets=(Bucket(2, 800, 100),))
    examples, measured, (batch,) = plan(train)
    row, empty = examples.row(measured.items[0], batch.bucket), examples.empty(batch.bucket)
    assert {name: (value.shape, value.dtype) for name, value in row.items()} == {
        n: (v.shape, v.dtype) for n, v in empty.items()
    }
    assert all((empty[name] == IGNORE).all() for name in empty if name == "targets")
    assert not any(np.array_equal(row[name], empty[name]) for name in row)


# --- what cannot be used


def test_longer_than_every_bucket(plan, path):
    train = changed(buckets=(SHORT,))
    _, measured, _ = plan(train)
    assert list(measured.skipped) == [
        "dialogue 5",
        "dialogue 7",
    ]  # (the first reply of this would fit)
    assert (
        measured.skipped["dialogue 5"]
        == "too long for every bucket (0 segments, 0 positions, 63 tokens)"
    )
    assert measured.reasons(1) == [f"2 x dialogue 5: {measured.skipped['dialogue 5']}"]
    assert {item.dialogue for item in measured.items} == {0, 1, 2, 3, 4, 6}
    with pytest.raises(ValueError, match=rf"^{path}: dialogue 5: too long for every bucket"):
        plan(dataclasses.replace(train, strict=True))
    with pytest.raises(
        ValueError,
        match=rf"^{path} has nothing to train stage 1b on: "
        "8 x dialogue 0: too long for every bucket ",
    ):
        plan(changed(buckets=(Bucket(0, 0, 5),)))


def test_what_a_stage_needs(plan, config, tokenizer, tmp_path):
    """Every stage names what a dialogue lacks: recordings, units, or tokens of a reply."""
    with Writer(tmp_path / "bare") as writer:
        writer.add(Dialogue("x", (Turn("user", "hi"), Turn("assistant", "no"))))
    needs = {
        "1a": "a user turn has no recording",
        "1b": "a reply has no units",
        "flow": "turn 1 has no recording or no units",
    }
    for stage, expected in needs.items():
        with pytest.raises(
            ValueError,
            match=rf"^{tmp_path / 'bare'} has nothing to train stage {stage} on: "
            rf"1 x dialogue 0: {expected}",
        ):
            plan(TrainConfig(stage, buckets=(LONG,)), tmp_path / "bare")
    no_tokens = SimpleNamespace(answer=lambda text: [])
    examples = stage_of(TRAIN).examples(config, no_tokens, Dataset(tmp_path / "bare"), "data")
    with pytest.raises(ValueError, match="dialogue 0: the reply 'no' has no tokens"):
        catalogue(examples, [0], (LONG,), strict=False)


@pytest.mark.parametrize("stage", ["1b", "2", "flow"])
def test_units_that_the_checkpoint_does_not_know(config, tokenizer, path, stage):
    small = config.replace(units=900, flow=dataclasses.replace(config.flow, units=900))
    train = TrainConfig(stage, buckets=(Bucket(9, 900, 900),))
    examples = stage_of(train).examples(small, tokenizer, Dataset(path), "data")
    with pytest.raises(
        ValueError,
        match=f"has nothing to train stage {stage} on: 8 x dialogue 0: a reply has units that .*; "
        r"prepare the data with .* of this checkpoint \(unit \d{4}, expected 0 to 899\)$",
    ):
        catalogue(examples, range(len(examples)), train.buckets, strict=False)


@pytest.fixture
def damaged(path, tmp_path) -> Path:
    """The data set with a byte of the question of dialogue 3 changed, and one of dialogue 5."""
    copy = shutil.copytree(path, tmp_path / "damaged")
    for file, content_of_record in (
        (min(copy.glob("clips-*")), encode_clip(QUESTIONS[3] / 32768, 16000)[200:240]),
        (min(copy.glob("dialogues-*")), b"d5"),
    ):
        content = bytearray(file.read_bytes())
        content[content.index(content_of_record)] ^= 1
        file.write_bytes(content)
    return copy


SPOKEN = TrainConfig(stage="1a", batch=8, steps=2, buckets=(Bucket(2, 800),), workers=2)


def test_damage_is_left_out_by_name(plan, damaged):
    """A dialogue that cannot be read is left out before training begins."""
    _, measured, _ = plan(SPOKEN, damaged)
    assert list(measured.skipped) == ["dialogue 5"] and measured.skipped["dialogue 5"].startswith(
        f"{damaged}: dialogue 5 is damaged: "
    )
    assert [item.dialogue for item in measured.items] == [0, 1, 2, 3, 4, 6, 7]
    with pytest.raises(ValueError, match="dialogue 5 is damaged") as error:
        plan(dataclasses.replace(SPOKEN, strict=True), damaged)
    assert "\n" not in str(error.value)


def test_damage_becomes_a_masked_row(plan, damaged):
    """A record that cannot be read during training is an empty row; other rows do not change."""
    examples, measured, batches = plan(SPOKEN)
    whole = Source(examples, measured, batches, slice(0, 8))[0]
    loader = Loader(examples, measured, batches, alone())
    examples.data = Dataset(damaged)
    (_, batch), _ = loader.start(0)
    broken = np.isin(batches[0].rows, (3, 5))
    assert broken.sum() == 2
    for name, value in batch.items():
        np.testing.assert_array_equal(value[0, ~broken], whole[name][0, ~broken])
        assert all(
            np.array_equal(row, examples.empty(Bucket(2, 800))[name]) for row in value[0, broken]
        )
    assert loader.source.damaged.keys() == {3, 5}
    assert loader.source.damaged[3].startswith(f"{damaged}: clip 6 is damaged: ")


def test_damage_is_fatal_when_strict(plan, damaged):
    examples, measured, batches = plan(dataclasses.replace(SPOKEN, strict=True))
    examples.data = Dataset(damaged)
    with pytest.raises(RecordError, match=rf"^{damaged}: (clip 6|dialogue 5) is damaged: .*$"):
        list(Loader(examples, measured, batches, alone()).start(0))


# --- arrays by hand


def row_of(
    plan, stage: str, dialogue: int, bucket: Bucket, path: Path | None = None, **changes
) -> dict[str, np.ndarray]:
    examples, measured, _ = plan(
        TrainConfig(stage, steps=1, buckets=(bucket,), **changes), *([path] if path else [])
    )
    (item,) = [item for item in measured.items if item.dialogue == dialogue][:1]
    return examples.row(item, bucket)


def test_row_of_text(plan, config, tokenizer):
    """Stage 1a, two turns: ids as in Omni2's prompt; replies have targets, one position early."""
    row = row_of(plan, "1a", 7, Bucket(3, 900))
    replies = [
        tokenizer.text.encode(TEXTS[number % 6], add_special_tokens=False) for number in (7, 8)
    ]
    eos = config.tokens.text_eos[0]
    first, both = tokenizer.prompt([1]), tokenizer.prompt([1, TEXTS[1], 1])
    ids = [*both, *replies[1], eos]
    assert row["ids"].tolist() == ids + [PAD] * (900 - len(ids))
    assert row["ids"].tolist().count(SPEECH) == 600 and both[: len(first)] == first
    targets = np.full(900, IGNORE)
    for start, reply in ((len(first), replies[0]), (len(both), replies[1])):
        targets[start - 1 : start + len(reply)] = [*reply, eos]
    np.testing.assert_array_equal(row["targets"], targets)
    shifted = row["targets"] != IGNORE
    np.testing.assert_array_equal(row["targets"][shifted], row["ids"][1:][shifted[:-1]])
    for clip, number in zip(row["audio"], (7, 8), strict=False):
        np.testing.assert_array_equal(clip[: 800 + number], QUESTIONS[number])
        assert not clip[800 + number :].any()
    assert not row["audio"][2].any()


def test_row_of_units(plan, config, tokenizer, path):
    """Stage 1b: a reply alone, its text ended; offline all of it first."""
    reply = Dataset(path).dialogue(2).turns[1]
    text = [*tokenizer.text.encode(TEXTS[2], add_special_tokens=False), config.tokens.text_eos[0]]
    assert len(text) > config.read
    for layout in ("read_write", "offline"):
        row, arranged = (
            row_of(plan, "1b", 2, LONG, layout=layout),
            arrange(text, reply.units.tolist(), config, layout == "offline"),
        )
        assert row["tokens"].tolist() == arranged.tokens.tolist() + [PAD] * (
            96 - len(arranged.tokens)
        )
        assert row["targets"].tolist() == arranged.targets.tolist() + [IGNORE] * (
            96 - len(arranged.tokens)
        )
        assert (row["tokens"][: len(text)].tolist() == text) == (layout == "offline")


def test_row_of_speech(plan, config, tokenizer, path):
    """Stage 2, two turns: each text token has the position whose hidden state produced it."""
    bucket = Bucket(3, 900, 96)
    row, spoken = row_of(plan, "2", 7, bucket), row_of(plan, "1a", 7, Bucket(3, 900))
    np.testing.assert_array_equal(row["ids"], spoken["ids"])
    np.testing.assert_array_equal(row["audio"], spoken["audio"])
    for turn, number in enumerate((7, 8)):
        text = [
            *tokenizer.text.encode(TEXTS[number % 6], add_special_tokens=False),
            config.tokens.text_eos[0],
        ]
        arranged = arrange(
            text, Dataset(path).dialogue(7).turns[2 * turn + 1].units.tolist(), config
        )
        size = len(arranged.tokens)
        np.testing.assert_array_equal(
            row["tokens"][turn], np.pad(arranged.tokens, (0, 96 - size), constant_values=PAD)
        )
        np.testing.assert_array_equal(
            row["targets"][turn], np.pad(arranged.targets, (0, 96 - size), constant_values=IGNORE)
        )
        is_text = row["source"][turn] != PAD
        assert is_text.tolist() == [*(arranged.source >= 0), *[False] * (96 - size)]
        # The target of that position in stage 1a is the text token itself.
        np.testing.assert_array_equal(
            spoken["targets"][row["source"][turn][is_text]], row["tokens"][turn][is_text]
        )
    assert (
        (row["tokens"][2] == PAD).all()
        and (row["targets"][2] == IGNORE).all()
        and (row["source"][2] == PAD).all()
    )


def test_row_of_a_recording(plan, path):
    """The flow: units and recording are cut to the shorter one, here 20 units of 0.8 s."""
    row = row_of(plan, "flow", 3, Bucket(0, 0, 40))
    units = Dataset(path).dialogue(3).turns[1].units
    assert row["units"].tolist() == units[:20].tolist() + [PAD] * 20
    np.testing.assert_array_equal(row["audio_24k"][: 960 * 20], REPLIES[3])
    assert (
        not row["audio_24k"][960 * 20 :].any()
        and not row["audio_16k"][640 * 20 :].any()
        and row["audio_16k"][: 640 * 20].any()
    )


@pytest.mark.parametrize("frames, segments", [(1500, 2), (250, 7)])
def test_a_question_longer_than_the_window(checkpoint_dir, config, tmp_path, frames, segments):
    """31 s are two segments of the encoder's window of 30 s, or seven of one of 5 s."""
    samples = (np.arange(31 * 16000) % 1000).astype(np.int16)
    with Writer(tmp_path / "long") as writer:
        turns = (
            Turn("user", "hi", samples=len(samples)),
            Turn("assistant", "No.", np.arange(5, dtype=np.int32)),
        )
        writer.add(Dialogue("long", turns), [encode_clip(samples / 32768, 16000), None])
    encoder = dataclasses.replace(config.speech_encoder, frames=frames)
    config = config.replace(speech_encoder=encoder)
    tokenizer = Tokenizer(checkpoint_dir, config, speech_positions(config))
    data = Dataset(tmp_path / "long")
    examples = stage_of(TrainConfig("1a")).examples(config, tokenizer, data, "data")
    (item,) = examples.items(0)
    row = examples.row(item, Bucket(segments, 800))
    assert config.segment_samples == 320 * frames and item.size.segments == segments
    np.testing.assert_array_equal(
        row["audio"].ravel(),
        np.pad(samples, (0, segments * config.segment_samples - len(samples))),
    )
    prompt = tokenizer.prompt([segments])
    assert row["ids"][: len(prompt)].tolist() == prompt
    assert row["ids"].tolist().count(SPEECH) == segments * frames // 5
    expected = rf"too long for every bucket \({segments} segments, \d\d\d positions, 0 tokens\)"
    with pytest.raises(ValueError, match=expected):
        catalogue(examples, [0], [Bucket(segments - 1, 800)], strict=True)

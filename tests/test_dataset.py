"""The format on disk: exact round trips, damaged records by name, bad data sets in one line."""

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest

from omni2_jax.train.data import records
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.records import Dialogue, Turn, encode_clip
from omni2_jax.train.data.writer import Shards, Writer
from tests.support.dialogues import pcm, spoken

RANDOM = np.random.default_rng(0)


def dialogue_of(name: str, *sizes: int) -> tuple[Dialogue, list[np.ndarray]]:
    """A dialogue with random units, and its turns' recordings of these sizes, int16."""
    clips = [pcm(RANDOM, size) for size in sizes]
    turns = [
        (
            f"{name} says: {i} ü",
            RANDOM.integers(0, 6561, 7 + i, np.int32) if i % 2 else None,
            recording,
        )
        for i, recording in enumerate(clips)
    ]
    return spoken(name, turns), clips


DIALOGUES = [
    dialogue_of("a", 1600, 2400),
    dialogue_of("b", 3, 48000, 16000, 1),
    dialogue_of("c", 800, 2000),
    dialogue_of("d", 160, 240),
]
SILENT = Dialogue("e", (Turn("user", "hi"), Turn("assistant", "no", np.array([0, 6560]))))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    with Writer(path, shard_bytes=30000, tokenizer="ckpt", fingerprint="f") as writer:
        for dialogue, clips in DIALOGUES:
            rates = [16000, 24000] * len(clips)
            writer.add(
                dialogue,
                [encode_clip(clip / 32768, rate) for clip, rate in zip(clips, rates, strict=False)],
            )
        writer.add(SILENT)
    return path


@pytest.fixture
def copy(path, tmp_path):
    """The data set, to be damaged."""
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def assert_complete(data: Dataset) -> None:
    """Assert that a data set holds what `path` was made of."""
    dialogues = [data.dialogue(i) for i in range(len(data))]
    written = [dialogue for dialogue, _ in DIALOGUES] + [SILENT]
    for actual, expected in zip(dialogues, written, strict=True):
        assert actual.id == expected.id
        for turn, other in zip(actual.turns, expected.turns, strict=True):
            assert (turn.role, turn.text, turn.samples) == (other.role, other.text, other.samples)
            assert (turn.units is None) == (other.units is None)
            if other.units is not None:
                np.testing.assert_array_equal(turn.units, other.units)
    for dialogue, (_, clips) in zip(dialogues, DIALOGUES, strict=False):
        for turn, clip in zip(dialogue.turns, clips, strict=True):
            samples = data.clip(turn.clip)
            assert samples.dtype == np.float32
            np.testing.assert_array_equal(samples * 32768, clip)
    assert [turn.clip for turn in dialogues[-1].turns] == [None, None]


def test_round_trip_bit_for_bit(path):
    assert len(list(path.glob("clips-*-of-0000[2-9].array_record"))) > 1
    assert not list(path.glob("*-0000?"))
    assert_complete(Dataset(path))


def test_info(path):
    expected = {
        "version": 1,
        "dialogues": 5,
        "recordings": 0,
        "turns": 12,
        "clips": 10,
        "user_clips": 5,
        "assistant_clips": 5,
    }
    expected |= {
        "user_seconds": pytest.approx(18563 / 16000),
        "assistant_seconds": pytest.approx(52641 / 24000),
    }
    expected |= {
        "replies_with_units": 6,
        "units": 8 * 4 + 10 + 2,
        "tokenizer": "ckpt",
        "fingerprint": "f",
    }
    expected |= {"user_rate": 16000, "assistant_rate": 24000}
    assert json.loads((path / "dataset.json").read_text()) == expected
    assert dataclasses.asdict(Dataset(path).info) == expected


def test_threads_and_copies_read(path):
    data = Dataset(path)
    with ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(data.clip, list(range(10)) * 8))
    for i, clip in enumerate(clips):
        np.testing.assert_array_equal(clip, data.clip(i % 10))
    assert_complete(pickle.loads(pickle.dumps(data)))


def test_samples_beyond_16_bits_are_clipped():
    np.testing.assert_array_equal(
        records.decode_clip(encode_clip(np.array([-1.5, -1, 0.5, 1, 2]), 24000)) * 32768,
        [-32768, -32768, 16384, 32767, 32767],
    )


def test_no_such_record(path):
    data = Dataset(path)
    for read, index in ((data.dialogue, 5), (data.dialogue, -1), (data.clip, 10), (data.clip, -1)):
        with pytest.raises(IndexError, match=f"{path} has .* there is no {index}"):
            read(index)


# ---- damage ----


def test_a_flipped_byte_damages_one_record(copy):
    first = min(copy.glob("clips-*"))
    first.write_bytes(flipped(first.read_bytes(), 1000))  # within the first clip's 3.2 kB
    data = Dataset(copy)
    for _ in range(2):
        with pytest.raises(RecordError, match=rf"^{copy}: clip 0 is damaged: .*hash mismatch.*$"):
            data.clip(0)
    np.testing.assert_array_equal(data.clip(1) * 32768, DIALOGUES[0][1][1])
    only = min(copy.glob("dialogues-*"))
    only.write_bytes(flipped(only.read_bytes(), only.read_bytes().index(b"b says: 2")))
    with pytest.raises(RecordError, match=rf"^{copy}: dialogue 1 is damaged: .*hash mismatch"):
        Dataset(copy).dialogue(1)
    assert Dataset(copy).dialogue(2).id == "c"


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def fields(role, text="t", **more):
    return {"role": role, "text": text, "units": None, "clip": None, "samples": 0} | more


def packed(*turns, id="x"):
    return msgpack.packb({"id": id, "turns": list(turns)})


USER, REPLY = fields("user"), fields("assistant")
RECORDS = {
    "no msgpack": (b"\xc1", "no msgpack of a dialogue"),
    "cut short": (packed(USER, REPLY)[:-3], "no msgpack of a dialogue"),
    "a number": (msgpack.packb(7), "no msgpack of a dialogue"),
    "without turns": (msgpack.packb({"id": "x"}), "'turns'"),
    "a field missing": (packed(USER, {"role": "assistant"}), "'units'"),
    "half a unit": (packed(USER, fields("assistant", units=b"\0\0\0")), "no msgpack of a dialogue"),
    "unit above": (
        packed(USER, fields("assistant", units=b"\1\0\xa1\x19")),
        "turn 1 has the unit 6561, expected 0 to 6560",
    ),
    "unit below": (packed(USER, fields("assistant", units=b"\xff\xff")), "turn 1 has the unit -1"),
    "no units in the units": (packed(USER, fields("assistant", units=b"")), "turn 1 has no units"),
    "roles": (packed(USER, USER), "turn 1 is of 'user', expected 'assistant'"),
    "the assistant first": (packed(REPLY, USER), "turn 0 is of 'assistant', expected 'user'"),
    "no reply": (packed(USER, REPLY, USER), "3 turns"),
    "no turns": (packed(), "0 turns"),
    "empty text": (packed(USER, fields("assistant", " \n")), "turn 1 has no text"),
    "text of another type": (packed(USER, fields("assistant", 7)), "turn 1 has no text"),
    "a clip that is not there": (packed(fields("user", clip=1), REPLY), "turn 0 names clip 1 of 1"),
    "an id of another type": (packed(USER, REPLY, id=7), "its id is 7, expected a text"),
    "a clip of another type": (packed(fields("user", clip="1"), REPLY), "damaged"),
}


def written(directory, dialogues: list[bytes], clips: list[bytes]):
    """A data set of these records, whatever they hold."""
    for name, contents in (("dialogues", dialogues), ("clips", clips)):
        shards = Shards(directory, name, 10**6)
        for record in contents:
            shards.add(record)
        shards.close()
    (directory / "dataset.json").write_text(
        json.dumps({"version": 1, "dialogues": len(dialogues), "clips": len(clips)})
    )
    return Dataset(directory)


@pytest.mark.parametrize("record, says", RECORDS.values(), ids=RECORDS)
def test_a_bad_record(record, says, tmp_path):
    data = written(tmp_path, [packed(USER, REPLY), record], [b"clip"])
    assert data.dialogue(0).id == "x"
    with pytest.raises(RecordError) as error:
        data.dialogue(1)
    assert str(error.value).startswith(f"{tmp_path}: dialogue 1 is damaged: ") and says in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_bad_clip(tmp_path):
    whole = encode_clip(pcm(RANDOM, 20000) / 32768, 16000)
    data = written(tmp_path, [packed(USER, REPLY)], [b"RIFF", whole[: len(whole) // 2], whole])
    for index in (0, 1):
        with pytest.raises(RecordError, match=rf"^{tmp_path}: clip {index} is damaged: .*FLAC"):
            data.clip(index)
    assert len(data.clip(2)) == 20000


# ---- opening ----

OPENING = {
    "no data set": (
        lambda path: (path / "dataset.json").unlink(),
        "is no data set: it has no dataset.json",
    ),
    "no JSON": (
        lambda path: (path / "dataset.json").write_text("{"),
        "does not describe a data set",
    ),
    "another JSON": (
        lambda path: (path / "dataset.json").write_text("[]"),
        "does not describe a data set",
    ),
    "another type": (
        lambda path: changed_info(path, clips="ten"),
        "does not describe a data set: .*clips",
    ),
    "newer": (
        lambda path: changed_info(path, version=2),
        "is a data set of version 2; this program reads version 1",
    ),
    "empty": (lambda path: changed_info(path, dialogues=0), "is empty: it holds no dialogue"),
    "a shard is missing": (
        lambda path: min(path.glob("clips-*")).unlink(),
        r"dataset\.json tells of 10 clips, its shards hold [1-9]$",
    ),
    "all shards are missing": (
        lambda path: min(path.glob("dialogues-*")).unlink(),
        r"tells of 5 dialogues, its shards hold 0$",
    ),
    "a shard is cut": (
        lambda path: min(path.glob("clips-*")).write_bytes(b"cut"),
        "is damaged, its clips cannot be opened",
    ),
}


def changed_info(path, **changes):
    file = path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("damage, says", OPENING.values(), ids=OPENING)
def test_opening(damage, says, copy):
    damage(copy)
    with pytest.raises(ValueError, match=says) as error:
        Dataset(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


# ---- writing ----


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "set") as writer:
        writer.add(DIALOGUES[0][0], [encode_clip(np.zeros(9), 16000), None])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_bad_dialogues_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="would be empty"), Writer(tmp_path / "set"):
        pass
    with (
        pytest.raises(ValueError, match="turn 1 has the unit 6561"),
        Writer(tmp_path / "set") as writer,
    ):
        writer.add(Dialogue("x", (Turn("user", "hi"), Turn("assistant", "no", np.array([6561])))))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="exists already"), Writer(tmp_path):
        pass

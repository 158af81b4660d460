"""Data sets of other projects as sources: VocalNet, SLAM-Omni, parquet files."""

import io
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from omni2_jax.train.data import prepare, sources
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.sources import SourceError


def dialogues(path, kind=None):
    """Every dialogue of a source as (id, [(text, units)], sounds); a SourceError where one is."""
    found = []
    for entry in sources.read(path, kind):
        try:
            source = entry.read()
        except SourceError as error:
            found.append(error)
            continue
        turns = [
            (turn.text, None if turn.units is None else turn.units.tolist())
            for turn in source.dialogue.turns
        ]
        found.append((source.dialogue.id, turns, source.sounds))
    return found


# ---- VocalNet ----


def npy(value) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def numpy1(value: object) -> bytes:
    """A .npy of an object as NumPy 1 writes it: `_core` was called `core`."""
    content = pickle.dumps(np.asanyarray(value, object), protocol=2)
    return npy(value)[:128] + content.replace(b"numpy._core", b"numpy.core")


class Evil:
    def __reduce__(self):
        return print, ("a pickle was run",)


ARRAYS = {
    "plain": (npy(np.array([5, 6560], np.int32)), [5, 6560]),
    "a row": (npy(np.array([[5, 6560]])), [5, 6560]),
    "a dict": (npy({"speech_token": np.array([[5, 6560]]), "speech_token_len": 2}), [5, 6560]),
    "of NumPy 1": (numpy1({"speech_token": np.array([[5]])}), [5]),
    "a program": (npy(Evil()), "its pickle names builtins.print, which is not read"),
    "numbers": (npy(np.array([0.5])), "its numbers are float64, expected integers"),
    "another dict": (npy({"tokens": [1]}), "holds no units"),
    "no npy": (b"NUMPY", "holds no units"),
    "a pickle": (pickle.dumps([1]), "holds no units"),
    "cut short": (npy(np.arange(9))[:-1], "holds no units"),
    "out of range": (npy(np.array([6561])), "turn 1 has the unit 6561, expected 0 to 6560"),
    "absent": (None, "No such file"),
}


@pytest.mark.parametrize("content, expected", ARRAYS.values(), ids=ARRAYS)
def test_vocalnet(content, expected, tmp_path, capsys):
    folder = tmp_path / "VoiceAssistant"
    (folder / "tokens").mkdir(parents=True)
    item = {
        "id": "7",
        "speech": "VoiceAssistant/audios/7.wav",
        "conversations": [
            {"from": "human", "value": "<speech>"},
            {"from": "gpt", "value": "It depends."},
        ],
        "units": "VoiceAssistant/tokens/7.npy",
    }
    (folder / "VoiceAssistant.json").write_text(json.dumps([item]))
    if content is not None:
        (folder / "tokens" / "7.npy").write_bytes(content)
    [found] = dialogues(folder / "VoiceAssistant.json")
    assert capsys.readouterr().out == ""
    if isinstance(expected, str):
        assert isinstance(found, SourceError) and expected in str(found)
    else:
        sound = tmp_path / "VoiceAssistant" / "audios" / "7.wav"
        assert found == ("7", [("<speech>", None), ("It depends.", expected)], (sound, None))


def test_vocalnet_damaged(tmp_path):
    human, gpt = {"from": "human", "value": "<speech>"}, {"from": "gpt", "value": "Yes."}
    items = [
        {"conversations": [human, gpt]},
        {"conversations": [human, human]},
        {"conversations": ["<speech>"]},
        {"conversations": None},
        {"conversations": [human, gpt], "units": 7},
        {"conversations": [{"from": "human", "value": "Hi."}, gpt] * 2, "speech": "a.wav"},
        {"conversations": [{"from": "human", "value": "<speech>\nAnswer briefly."}, gpt]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(items))
    found = dialogues(tmp_path / "x.json", "vocalnet")
    assert found[0] == ("0", [("<speech>", None), ("Yes.", None)], (None, None))
    assert [str(error) for error in found[1:5]] == [
        "turn 1 is of 'user', expected 'assistant'",
        "turn 0 is '<speech>', expected an object",
        "there is no list 'conversations'",
        "the dialogue: 'units' is 7, expected a path",
    ]
    assert found[5][2] == (None,) * 4  # the recording belongs to the turn "<speech>" alone
    assert found[6][1][0] == ("<speech>", None)


# ---- rows with one question and its reply ----

DIALOGUE = [
    ("What is a tide?", "The sea rises."),
    ("<USER>: What is a tide? <ASSISTANT>: The sea rises. <USER>: Why?", "The moon pulls."),
    (
        "USER: What is a tide?\nASSISTANT: The sea rises.\nUSER: Why? ASSISTANT: The moon pulls. "
        "<USER>: How often?",
        "Twice a day.",
    ),
]
OTHER = [
    ("<USER>: Who? <ASSISTANT>: Me. <USER>: And you?", "I am here."),  # its first row is missing
    ("What does USER mean?", "Someone who uses."),
]
TURNS = [
    ["What is a tide?", "The sea rises.", "Why?", "The moon pulls.", "How often?", "Twice a day."],
    ["And you?", "I am here."],
    ["What does USER mean?", "Someone who uses."],
]


def test_slam(tmp_path):
    lines = [
        {
            "key": f"k{number}",
            "source_wav": f"q{number}.wav",
            "source_text": question,
            "target_token": [number, 6000],
            "target_text": reply,
        }
        for number, (question, reply) in enumerate([*DIALOGUE, *OTHER])
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "train.jsonl").write_text(text + "\n{cut")
    *found, cut = dialogues(tmp_path / "train.jsonl")
    assert [[text for text, _ in turns] for _, turns, _ in found] == TURNS
    assert [name for name, *_ in found] == ["k0", "k3", "k4"]
    assert [units for _, units in found[0][1][1::2]] == [[0, 6000], [1, 6000], [2, 6000]]
    assert found[1][2] == (tmp_path / "q3.wav", None)
    assert str(cut).startswith("line 6 of")


ROW = {"source_text": "Q?", "target_text": "A."}
COSYVOICE1 = "holds tokens of CosyVoice 1 (4096 of them, 50 a second)"
UNITS = {
    "above the vocabulary": ({"target_token": [1, 6561]}, "has the unit 6561, expected 0 to 6560"),
    "another key": ({"answer_cosyvoice_speech_token": [1, 2]}, COSYVOICE1),
    "all small": ({"target_token": list(range(100))}, COSYVOICE1),
    "small, but few": ({"target_token": list(range(99))}, list(range(99))),
    "made again": ({"target_token": list(range(100)), "target_wav": "a.wav"}, None),
    "as text": ({"target_token": "<1><5000>"}, [1, 5000]),
}


@pytest.mark.parametrize("fields, expected", UNITS.values(), ids=UNITS)
def test_tokens_of_cosyvoice_1_are_refused(fields, expected, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW | fields))
    [found] = dialogues(tmp_path / "x.jsonl")
    if isinstance(expected, str):
        assert isinstance(found, SourceError) and expected in str(found)
    else:
        assert found[1][1] == ("A.", expected)


def sound(samples: int, rate: int, form: str) -> dict:
    file = io.BytesIO()
    soundfile.write(file, np.linspace(-0.5, 0.5, samples), rate, format=form)
    return {"bytes": file.getvalue(), "path": "its name"}


def write_parquet(path, rows: list[dict]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.fixture
def shards(tmp_path):
    """Two parquet files of a data set as Hugging Face lays them out; a dialogue lies in both."""
    rows = [
        {
            "id": f"r{number}",
            "round": 1,
            "question": question,
            "question_audio": sound(1600 + 160 * number, 16000, "WAV"),
            "answer": reply,
            "answer_audio": sound(2400, 24000, "FLAC"),
            "answer_snac": "not read",
        }
        for number, (question, reply) in enumerate([*DIALOGUE, *OTHER])
    ]
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", rows[2:])
    return tmp_path / "set"


def test_parquet(shards, tmp_path):
    prepare.prepare(shards, tmp_path / "out")
    data = Dataset(tmp_path / "out")
    found = [data.dialogue(index) for index in range(len(data))]
    assert [dialogue.id for dialogue in found] == ["r0", "r3", "r4"]
    assert [[turn.text for turn in dialogue.turns] for dialogue in found] == TURNS
    assert [turn.samples for turn in found[0].turns] == [1600, 2400, 1760, 2400, 1920, 2400]
    clip = data.clip(found[0].turns[0].clip)
    np.testing.assert_allclose(clip, np.linspace(-0.5, 0.5, 1600), atol=1 / 32768)


def test_parquet_is_read_row_by_row(shards):
    """Later rows are not read before they are asked for, and the share of them is reported."""
    (shards / "data" / "train-00001-of-00002.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is no parquet file"):
        list(sources.read(shards))
    done = [entry.done for entry in sources.read(shards / "data" / "train-00000-of-00002.parquet")]
    assert done == [1.0]


def test_a_split_of_parquet(tmp_path):
    rows = [{"question": f"{i}?", "answer": "A.", "split": ("train", "test")[i]} for i in (0, 1)]
    write_parquet(tmp_path / "x.parquet", rows)
    [entry] = sources.read(tmp_path, split="test")
    assert entry.read().dialogue.turns[0].text == "1?"
    with pytest.raises(ValueError, match=r"no dialogue of split 'dev'; it has 'test', 'train'$"):
        list(sources.read(tmp_path, split="dev"))


FAULTS = {
    "damaged": ({"bytes": b"RIFF", "path": None}, "audio unreadable: the question_audio of turn 0"),
    "a path": ({"bytes": None, "path": "gone.wav"}, "audio missing: turn 0: {}/gone.wav does not"),
}


@pytest.mark.parametrize("audio, says", FAULTS.values(), ids=FAULTS)
def test_parquet_with_damaged_sound(audio, says, tmp_path):
    row = {"question": "Q?", "question_audio": audio, "answer": "A."}
    write_parquet(tmp_path / "x.parquet", [row])
    kind, message = says.format(tmp_path).split(": ", 1)
    with pytest.raises(ValueError) as error:
        prepare.prepare(tmp_path / "x.parquet", tmp_path / "out")
    assert kind in str(error.value) and message in str(error.value)


def test_parquet_of_something_else(tmp_path):
    write_parquet(tmp_path / "x.parquet", [{"prompt": "Q?", "answer": "A."}])
    with pytest.raises(ValueError, match=r"no column 'question'; its columns are answer, prompt"):
        list(sources.read(tmp_path))

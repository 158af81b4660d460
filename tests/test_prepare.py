"""`omni2 prepare`: recordings, units made in batches, and its work as a job."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.models import speech_tokenizer
from omni2_jax.train.data import unit_batches
from tests.support.networks import TOKENIZER_CLIPS as CLIPS
from tests.support.paths import AUDIO, GOLDENS, ROOT
from tests.support.preparing import SPOKEN, content, lines, prepared, run


def test_units_are_those_of_every_clip_alone(speech_tokenizer_dir, tmp_path):
    """Replies of seven lengths in batches of two; one brings its own units."""
    replies = [str(AUDIO / f"{name}.wav") for name in CLIPS] + sorted(
        map(str, SPOKEN.glob("*-a.wav"))
    )
    dialogues = [[("hi", None), ("yes", reply)] for reply in replies]
    dialogues.insert(1, [("hi", None), ("no", replies[0], [0, 6560])])
    (tmp_path / "data.jsonl").write_text(lines(*dialogues))
    data = prepared(
        tmp_path, tmp_path / "out", "--speech-tokenizer", speech_tokenizer_dir, "--batch", 2
    )
    units = [data.dialogue(i).turns[1].units for i in range(len(data))]
    np.testing.assert_array_equal(units.pop(1), [0, 6560])
    for name, row in zip(CLIPS, units, strict=False):
        np.testing.assert_array_equal(
            row, np.load(GOLDENS / "s3tokenizer" / f"{name}.npz")["codes"]
        )
    net = speech_tokenizer.load(speech_tokenizer_dir)
    for reply, row in zip(replies, units, strict=True):
        wav, length = recordings.pad([recordings.load(reply)], 48000)
        codes, count = speech_tokenizer.tokenize(net, wav, length)
        np.testing.assert_array_equal(row, codes[0, : count[0]])
    assert (data.info.tokenizer, data.info.fingerprint) == (
        str(speech_tokenizer_dir),
        speech_tokenizer.fingerprint(net),
    )


def test_batches_have_few_shapes(monkeypatch):
    """Recordings up to 2 minutes, four at a time; a stand-in for the tokenizer notes its input."""
    shapes = []

    def tokenize(_, wav, lengths):
        shapes.append((len(wav), wav.shape[1] / recordings.INPUT_RATE))
        assert [np.count_nonzero(row) for row in wav] == lengths.tolist()
        return np.repeat(lengths[:, None], wav.shape[1], axis=1), lengths

    monkeypatch.setattr(unit_batches, "tokenize", tokenize)
    seconds = np.random.default_rng(0).permutation(
        [1, 2, 3, 4, 6, 7, 10, 14, 19, 29, 30, 31, 61, 120]
    )
    units = unit_batches.batched_units(
        None, [np.ones(n * recordings.INPUT_RATE, np.float32) for n in seconds], 4
    )
    assert (
        [len(row) for row in units]
        == [row[0] for row in units]
        == [n * recordings.INPUT_RATE for n in seconds]
    )
    assert shapes == [(4, 6), (4, 15), (4, 60), (4, 120)]
    assert [unit_batches.fixed_length(samples) for samples in (160, 48000, 48001)] == [
        48000,
        48000,
        96000,
    ]


def test_the_examples(tmp_path):
    """16-bit recordings at their role's rate are stored bit for bit, others are resampled."""
    data = prepared(SPOKEN, tmp_path / "out")
    assert (
        data.info.dialogues,
        data.info.turns,
        data.info.clips,
        data.info.replies_with_units,
    ) == (4, 10, 10, 0)
    for dialogue, line in zip(
        map(data.dialogue, range(4)),
        (SPOKEN / "data.jsonl").read_text().splitlines(),
        strict=True,
    ):
        item = json.loads(line)
        assert dialogue.id == item["id"]
        for turn, expected in zip(dialogue.turns, item["turns"], strict=True):
            assert (turn.role, turn.text, turn.units) == (expected["role"], expected["text"], None)
            wav = recordings.load(
                SPOKEN / expected["audio"], 16000 if turn.role == "user" else 24000
            )
            assert turn.samples == len(wav)
            np.testing.assert_allclose(
                data.clip(turn.clip), wav, rtol=0, atol=0 if turn.role == "user" else 0.51 / 32768
            )


def test_a_long_question_is_kept_whole(tmp_path):
    recordings.save(tmp_path / "long.wav", np.zeros(31 * 16000), 16000)
    (tmp_path / "data.jsonl").write_text(lines([("hm", "long.wav"), ("yes", None)]))
    turns = prepared(tmp_path, tmp_path / "out").dialogue(0).turns
    assert turns[0].samples == 31 * 16000 and turns[1].clip is None and turns[1].units is None


def test_a_question_that_nobody_asks(tmp_path):
    """A user's recording may have the text "", a turn without a recording may not."""
    recordings.save(tmp_path / "quiet.wav", np.zeros(16000), 16000)
    turns = [[("", "quiet.wav"), ("Pardon?", None)], [("", None), ("Pardon?", None)]]
    (tmp_path / "data.jsonl").write_text(lines(*turns, [("Q?", None), ("", "quiet.wav")]))
    data = prepared(tmp_path, tmp_path / "out")
    assert [turn.text for turn in data.dialogue(0).turns] == ["", "Pardon?"] and len(data) == 1


# ---- as a job ----


@pytest.fixture
def spoken(tmp_path):
    """24 dialogues in groups of four; the sixth cannot be used."""
    for name in CLIPS:
        shutil.copy(AUDIO / f"{name}.wav", tmp_path)
    dialogues = [[("hi", None), ("yes", f"{CLIPS[i % len(CLIPS)]}.wav")] for i in range(24)]
    shutil.copy(AUDIO / f"{CLIPS[0]}.wav", tmp_path / "first.wav")
    dialogues[0] = [("hi", None), ("yes", "first.wav")]
    dialogues[5] = [("hi", "gone.wav"), ("no", None)]
    (tmp_path / "data.jsonl").write_text(lines(*dialogues))
    return tmp_path


@pytest.fixture
def whole_run(spoken, speech_tokenizer_dir):
    """The arguments of a run, and the files and the report that it leaves."""
    args = ("--source", spoken, "--speech-tokenizer", speech_tokenizer_dir, "--batch", 1)
    code, printed = run(*args, "--out", spoken / "all")
    assert code == 0 and not (spoken / "all.work").exists()
    return args, content(spoken / "all"), printed.replace("/all ", "/out ")


def test_a_killed_run_goes_on(spoken, whole_run):
    args, files, printed = whole_run
    options = [sys.executable, "-m", "omni2_jax", "prepare", *map(str, args), "--workers", "1"]
    process = subprocess.Popen([*options, "--out", str(spoken / "out")], cwd=ROOT)
    journal = spoken / "out.work" / "journal-0-of-1.jsonl"
    while not journal.exists() or b"groups/" not in journal.read_bytes():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 0 < len(content(spoken / "out.work" / "groups")) < 6 and not (spoken / "out").exists()
    code, _ = run(*args, "--out", spoken / "out", "--max-seconds", 500)
    assert "was begun with max_seconds 600.0, not 500.0" in str(code)
    (spoken / "first.wav").unlink()  # it is in the first group, which is not made again
    code, again = run(*args, "--out", spoken / "out")
    assert (code, again) == (0, printed) and content(spoken / "out") == files
    assert not (spoken / "out.work").exists()


def test_shards_are_merged(spoken, whole_run):
    args, files, printed = whole_run
    for index in (1, 0):
        code, _ = run(*args, "--out", spoken / "out", "--shard", f"{index}/2")
        assert code == 0 and not (spoken / "out").exists()
        if index:
            code, _ = run(*args, "--out", spoken / "out")
            assert "3 groups of dialogues are missing" in str(code) and "--shard 0/2" in str(code)
    code, again = run(*args, "--out", spoken / "out")
    assert (code, again) == (0, printed) and content(spoken / "out") == files


def test_strict_after_a_run_that_was_not(spoken, whole_run):
    args, _, _ = whole_run
    run(*args, "--out", spoken / "out", "--shard", "0/2")
    run(*args, "--out", spoken / "out", "--shard", "1/2")
    code, _ = run(*args, "--out", spoken / "out", "--strict")
    assert f"{spoken}: d5 (dialogue 5): turn 0: " in str(code) and not (spoken / "out").exists()

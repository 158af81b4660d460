"""`omni2 prepare` of a voice's recordings with their text: splits, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni2_jax.train.data import prepare, sources
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.dialogues import DialogueExamples
from tests.support.runs import toy_run

RATE = 22050


def tone(path: Path, seconds: float, level: float = 0.1, rate: int = RATE) -> str:
    """A recording of 200 Hz; its name."""
    samples = level * np.sin(2 * np.pi * 200 * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, samples, rate)
    return path.name


def metadata(folder: Path, *lines: dict) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def voice(tmp_path) -> Path:
    names = [tone(tmp_path / f"{i}.wav", 0.5 + i / 10) for i in range(3)]
    splits = ("train", "train", "test")
    lines = [
        {"audio": name, "text": f"Sentence {i}.", "split": split}
        for i, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    return metadata(tmp_path, *lines)


def test_recordings_with_their_text(voice, tmp_path):
    prepare.prepare(voice, tmp_path / "train", split="train")
    prepare.prepare(voice, tmp_path / "all")
    data = Dataset(tmp_path / "train")
    assert len(data) == 2 and len(Dataset(tmp_path / "all")) == 3
    dialogue = data.dialogue(1)
    (turn,) = dialogue.turns
    assert (turn.role, turn.text, turn.units) == ("assistant", "Sentence 1.", None)
    assert turn.samples == len(data.clip(turn.clip)) == round(0.6 * 24000)
    assert data.info.recordings == data.info.assistant_clips == 2 and not data.info.user_clips
    assert data.info.assistant_seconds == pytest.approx(1.1)


def test_split_that_does_not_exist(voice, tmp_path):
    with pytest.raises(ValueError, match=r"no dialogue of split 'dev'; it has 'test', 'train'$"):
        prepare.prepare(voice, tmp_path / "dev", split="dev")
    assert not (tmp_path / "dev").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"audio": "good.wav"}, "turn 0 has no text"),
        ({"audio": "good.wav", "text": " "}, "turn 0 has no text"),
        ({"audio": None, "text": "A."}, "there is no 'audio'"),
        ({"audio": "gone.wav", "text": "A."}, r"gone\.wav does not exist"),
        ({"audio": "silent.wav", "text": "A."}, r"silent\.wav holds no sound"),
        ({"audio": "phone.wav", "text": "A."}, r"a rate of 8000 Hz, expected at least 16000 Hz"),
        ({"audio": "short.wav", "text": "A."}, "less than 10 ms"),
    ],
)
def test_bad_recordings(tmp_path, line, message):
    """Each is left out and named; alone, or when strict, it ends the command in one line."""
    tone(tmp_path / "good.wav", 0.5)
    tone(tmp_path / "silent.wav", 0.5, 1e-4)
    tone(tmp_path / "phone.wav", 0.5, rate=8000)
    tone(tmp_path / "short.wav", 0.005)
    source = metadata(tmp_path, line, {"audio": "good.wav", "text": "Good."})
    prepare.prepare(source, tmp_path / "data")
    assert len(Dataset(tmp_path / "data")) == 1
    with pytest.raises(ValueError, match=rf"dialogue 0: .*{message}"):
        prepare.prepare(source, tmp_path / "strict", strict=True)
    metadata(tmp_path, line)
    with pytest.raises(ValueError, match=rf"nothing of .* can be used: 1 x .*{message}"):
        prepare.prepare(source, tmp_path / "alone", format="recordings")
    assert not (tmp_path / "strict").exists() and not (tmp_path / "alone").exists()


def test_format_of_a_file(voice):
    """A .jsonl whose first line has "audio" holds recordings; otherwise it holds dialogues."""
    assert sources.infer(voice / "metadata.jsonl") == "recordings"
    (voice / "data.jsonl").write_text('{"turns": []}\n')
    assert sources.infer(voice / "data.jsonl") == "jsonl"


def test_stages_with_questions_leave_recordings_out(voice, tmp_path, checkpoint_dir):
    prepare.prepare(voice, tmp_path / "data")
    data = Dataset(tmp_path / "data")

    class Whole(DialogueExamples):
        def fill(self, row, item): ...

    examples = Whole(toy_run(checkpoint_dir, data.path), None, None, data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="it is a recording with its text, without a question"):
        examples.items(0)

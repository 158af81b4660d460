"""Copy synthesis: its measurements by hand, what a checkpoint lacks, and the command."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.cli.main import main
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.evaluate import copies, measure
from omni2_jax.evaluate.copies import Copy, CopyMaker
from omni2_jax.evaluate.report import plots
from omni2_jax.evaluate.report.write import write_report
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.tasks import TaskOptions, copy_synthesis
from omni2_jax.evaluate.tasks.copy_synthesis import CopySynthesis, compare, log_mel
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.speech_tokenizer import SpeechTokenizer
from tests.support.evaluations import ScriptedRecogniser, write_items
from tests.support.networks import fresh_model

SMALL = SpeechTokenizerConfig(mels=80, width=32, layers=1, heads=2, digits=8, fsmn_taps=7)


def voiced(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """A harmonic sound of one frequency."""
    time = np.arange(round(24000 * seconds)) / 24000
    harmonics = [np.sin(2 * np.pi * k * hertz * time) / k for k in range(1, 9)]
    return (0.1 * np.sum(harmonics, 0)).astype(np.float32)


def whole(directory: Path, out: Path, config: SpeechTokenizerConfig = SMALL) -> Path:
    """A copy of a checkpoint, with a speech tokenizer."""
    shutil.copytree(directory, out)
    _, params = fresh_model(lambda rngs: SpeechTokenizer(config, rngs))
    parameters.save_part(out, "speech_tokenizer", params)
    speech_tokenizer.save_config(out, config)
    return out


def without(directory: Path, out: Path, *parts: str) -> Path:
    """A copy of a checkpoint without some parts."""
    shutil.copytree(directory, out)
    for part in parts:
        shutil.rmtree(out / "params" / part)
    return out


# --- measurements


def test_a_perfect_copy():
    speech = voiced(150)
    found = compare(speech, log_mel(speech), Copy(log_mel(speech), speech, 0.1))
    assert found == {"mel": 0, "voicing": 0, "f0": 0}


def test_another_frequency():
    """Twelve hertz higher; and half of the copy silent."""
    speech, copy = voiced(150), voiced(162)
    found = compare(speech, log_mel(speech), Copy(log_mel(copy), copy, 0.1))
    assert found["f0"] == pytest.approx(12, abs=0.5) and found["voicing"] < 0.1
    assert found["mel"] > 0.1
    copy[:12000] = 0
    found = compare(speech, log_mel(speech), Copy(log_mel(copy), copy, 0.1))
    assert found["voicing"] == pytest.approx(0.5, abs=0.1)


def test_a_copy_without_samples():
    """The flow's mel is compared as it is."""
    mel = log_mel(voiced(150))
    assert compare(voiced(150), mel, Copy(mel + 0.25, None, 0.1)) == {"mel": pytest.approx(0.25)}


def test_summary(checkpoint_dir, tmp_path):
    """Words are weighed by their number; a path that was not measured is not reported."""
    task = CopySynthesis(TaskOptions(checkpoint=checkpoint_dir, copies=tmp_path))
    own = {"dnsmos": 3.0, "words": 4, "errors": 1, "seconds": 2.0}
    other = {"dnsmos": 1.0, "words": 16, "errors": 0, "seconds": 2.0}
    copy = {"dnsmos": 2.0, "words": 4, "errors": 3, "mel": 0.5, "voicing": 0.1, "seconds": 1.0}
    rows = [
        {"recording": own, "vocoder": copy | {"f0": 2.0}},
        {"recording": other, "vocoder": copy | {"words": 16, "errors": 1}},  # nothing is voiced
    ]
    found = {name: estimate.value for name, estimate in task.summarise(rows, []).items()}
    assert found == pytest.approx(
        {
            "recording_wer": 5,
            "recording_dnsmos": 2,
            "vocoder_wer": 20,
            "vocoder_wer_above": 15,
            "vocoder_dnsmos": 2,
            "vocoder_mel": 0.5,
            "vocoder_f0": 2,
            "vocoder_voicing": 10,
            "vocoder_real_time": 0.5,
        }
    )


# --- what a checkpoint lacks


def test_paths_of_a_checkpoint(checkpoint_dir, tmp_path):
    """What can be copied is copied, the rest is named; units that do not fit are refused."""
    assert copies.paths(whole(checkpoint_dir, tmp_path / "all")) == {
        "vocoder": [],
        "flow": [],
        "chain": [],
    }
    assert copies.paths(checkpoint_dir) == {
        "vocoder": [],
        "flow": ["speech_tokenizer"],
        "chain": ["speech_tokenizer"],
    }
    silent = without(tmp_path / "all", tmp_path / "silent", "vocoder")
    assert copies.paths(silent)["flow"] == [] and copies.paths(silent)["chain"] == ["vocoder"]
    nothing = without(checkpoint_dir, tmp_path / "nothing", "vocoder")
    with pytest.raises(ValueError, match="can copy nothing: it needs a vocoder, or"):
        copies.paths(nothing)
    seven = SpeechTokenizerConfig(mels=80, width=32, layers=1, heads=2, digits=7)
    with pytest.raises(ValueError, match="silent has no vocoder"):
        CopyMaker(silent, vocoder_only=True)
    with pytest.raises(ValueError, match="makes 2187 units, its flow reads 6561"):
        copies.paths(whole(checkpoint_dir, tmp_path / "seven", seven))


@pytest.mark.slow
def test_copies(new_checkpoint):
    """All paths of a tiny checkpoint: as long as the recording, whatever it is padded to."""
    maker = CopyMaker(new_checkpoint)
    speech = voiced(150, 1.0)
    made = maker(speech)
    assert set(made) == {"vocoder", "flow", "chain"}
    for name, copy in made.items():
        assert copy.mel.shape == (50, 80) and np.isfinite(copy.mel).all()
        assert (copy.samples is None) == (name == "flow")
        assert copy.samples is None or copy.samples.shape == speech.shape
    again = maker(np.concatenate([speech, voiced(100, 0.2)]))["vocoder"]
    # The first frames do not see what follows them.
    np.testing.assert_allclose(again.samples[:12000], made["vocoder"].samples[:12000], atol=1e-4)
    with pytest.raises(ValueError, match="has no whole unit"):
        maker(speech[:900])


# --- the command


class PerfectMaker:
    """Copies that are the recordings, by the paths that the checkpoint has."""

    def __init__(self, directory: Path, voice: str | None):
        self.paths = [path for path, lacking in copies.paths(directory).items() if not lacking]

    def __call__(self, samples: np.ndarray) -> dict[str, Copy]:
        return {path: Copy(log_mel(samples), samples, 0.5) for path in self.paths}


@pytest.fixture
def omni2(monkeypatch, capsys):
    """Run `omni2 evaluate` in this process -> (exit code or the line of its error, stdout)."""
    monkeypatch.setattr(measure, "open_recogniser", lambda source, options: ScriptedRecogniser())
    monkeypatch.setattr(copy_synthesis, "CopyMaker", PerfectMaker)
    monkeypatch.setattr(copy_synthesis, "open_dnsmos", lambda: lambda samples: 3.0)

    def run(*args: object) -> tuple[int | str, str]:
        monkeypatch.setattr(sys, "argv", ["omni2", "evaluate", *map(str, args)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().out

    return run


def test_command(omni2, checkpoint_dir, tmp_path):
    data = write_items(tmp_path / "data")
    arguments = ["--system", checkpoint_dir, "--data", data, "--out", tmp_path / "out"]
    code, printed = omni2("--task", "copy-synthesis", *arguments, "--recogniser", "scripted")
    assert code == 0 and "vocoder: mel" in printed
    found = Results.load(tmp_path / "out" / "results.json").tasks["copy-synthesis"]
    assert found.settings["left_out"] == {"flow": "speech_tokenizer", "chain": "speech_tokenizer"}
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values["vocoder_mel"] == values["vocoder_wer_above"] == values["vocoder_f0"] == 0
    assert values["recording_wer"] == values["vocoder_wer"] and values["recording_dnsmos"] == 3
    names = sorted(path.name for path in (tmp_path / "out" / "copies").iterdir())
    assert [name for name in names if name.endswith("-vocoder.wav")] == [
        f"{name}-vocoder.wav" for name in ("bread", "cats", "sea", "tea")
    ]
    assert "sea.png" in names
    samples = recordings.load(tmp_path / "out" / "copies" / "sea-vocoder.wav", 24000)
    assert len(samples) % 960 == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n')
    report = write_report([tmp_path / "out"], tmp_path / "report", [tmp_path / "run"])
    for picture in ("copy-0-sea.png", "run-0-run.png"):
        assert f"]({picture})" in report.read_text() and (report.parent / picture).is_file()
    assert "Table 1" not in report.read_text()  # no number of the paper is comparable


def test_a_recogniser_that_fails(omni2, checkpoint_dir, tmp_path, monkeypatch):
    """At one recording: it is left out and counted. As a whole: the command ends."""
    # Each recording is heard once, and then once more with its copy.
    faults: list[Exception | None] = [*[None] * 6, ValueError("(400: too short)")]

    def fail():
        if fault := faults.pop(0) if faults else None:
            raise fault

    recogniser = ScriptedRecogniser(before=fail)
    monkeypatch.setattr(measure, "open_recogniser", lambda *_: recogniser)
    data = write_items(tmp_path / "data")
    arguments = ["--task", "copy-synthesis", "--system", checkpoint_dir, "--data", data]
    arguments += ["--recogniser", "scripted", "--out", tmp_path / "out"]
    assert omni2(*arguments)[0] == 0
    found = Results.load(tmp_path / "out" / "results.json").tasks["copy-synthesis"]
    assert (found.answers, found.left_out) == (3, {"not scored": 1})
    faults += [*[None] * 6, RuntimeError("http://a/v1 refuses the key")]
    assert omni2(*arguments[:-1], tmp_path / "other")[0] == "error: http://a/v1 refuses the key"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "asr-wer"], "the task copy-synthesis copies recordings"),
        (["--split", "dev"], "has no item of split 'dev'"),
        (["--system", "nothing"], "copy-synthesis needs a checkpoint"),
    ],
)
def test_bad_commands(omni2, checkpoint_dir, tmp_path, changes, message):
    data = write_items(tmp_path / "data")
    arguments = ["--system", checkpoint_dir, "--data", data, "--out", tmp_path / "out"]
    code, _ = omni2("--task", "copy-synthesis", *arguments, *changes)
    assert isinstance(code, str) and message in code and "\n" not in code
    assert not (tmp_path / "out").exists()


def test_curves_of_a_run(tmp_path):
    """One panel for each measurement; lines that a killed run left incomplete are skipped."""
    lines = [{"step": i, "loss": 5.0 - i, "rate": 1e-3} for i in range(4)]
    lines.append({"step": 3, "validation_loss": 2.0, "perplexity": 300.0})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plots.curves(tmp_path / "metrics.jsonl") == {
        "loss": ([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]),
        "validation_loss": ([3], [2.0]),
        "perplexity": ([3], [300.0]),
    }
    assert plots.draw_run(tmp_path, tmp_path / "run.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        plots.draw_run(tmp_path / "other", tmp_path / "other.png")

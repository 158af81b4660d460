"""`omni2 chat --record`, with a stand-in for sounddevice that plays a recording."""

import sys
from pathlib import Path

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.cli import microphone
from omni2_jax.generate.omni2 import Omni2
from tests.support.commands import chat, is_error_line
from tests.support.paths import AUDIO, EXAMPLES

SECOND = recordings.INPUT_RATE
SAMPLES = "samples.npy"
STAND_IN = f'''
import numpy as np
from pathlib import Path

class PortAudioError(Exception): pass

def query_devices(kind): return {{"name": "stand-in"}}

class InputStream:
    def __init__(self, samplerate, channels, dtype, blocksize):
        assert (samplerate, channels, dtype) == ({SECOND}, 1, "float32")
        self.samples = np.load(Path(__file__).with_name("{SAMPLES}"))
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def read(self, count):
        block, self.samples = self.samples[:count], self.samples[count:]
        assert len(block), "the question has not ended"
        return np.pad(block, (0, count - len(block)))[:, None], False
'''
BROKEN = {
    "raise OSError('PortAudio library not found')": "PortAudio library not found; install PortA",
    "class PortAudioError(Exception): pass\n"
    "def query_devices(kind): raise PortAudioError('Error querying device -1')": "no microphone",
}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Put a stand-in where `import sounddevice` finds it."""

    def install(source: str, samples: np.ndarray | None = None) -> None:
        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "sounddevice.py").write_text(source)
        if samples is not None:
            np.save(tmp_path / SAMPLES, samples.astype(np.float32))

    yield install
    sys.modules.pop("sounddevice", None)


def spoken(path: Path, before: float, after: float) -> np.ndarray:
    (samples,) = recordings.load_turn(path)
    return np.pad(samples, (int(before * SECOND), int(after * SECOND)))


def test_a_question_ends_with_silence(install):
    """It begins a little before the speech: pauses around it are not part of it."""
    path = EXAMPLES / "question.wav"
    install(STAND_IN, spoken(path, before=2, after=3))
    (whole,) = recordings.load_turn(path)
    heard = microphone.record(30)
    assert abs(len(heard) - len(whole)) < 0.6 * SECOND
    assert np.abs(heard).sum() > 0.95 * np.abs(whole).sum()


def test_a_question_ends_at_the_limit_or_with_enter(install, monkeypatch):
    speech = spoken(EXAMPLES / "voice.wav", before=1, after=0)
    install(STAND_IN, speech)
    assert len(microphone.record(2)) == 2 * SECOND
    presses = iter([False] * 50 + [True])
    monkeypatch.setattr(microphone, "enter_pressed", lambda: next(presses))
    assert 0 < len(microphone.record(30)) <= 50 * microphone.WINDOW


def test_nobody_speaks(install):
    install(STAND_IN, np.zeros(3 * SECOND))
    assert len(microphone.record(2)) == 2 * SECOND


def test_without_the_library(omni2, monkeypatch, checkpoint_dir):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    line, *_ = omni2(*chat(checkpoint_dir, "--record"))
    assert is_error_line(line) and "pip install 'omni2-jax[record]'" in line
    line, *_ = omni2(*chat(checkpoint_dir, "--record", EXAMPLES / "question.wav"))
    assert is_error_line(line) and "--record takes neither" in line


@pytest.mark.parametrize("source", BROKEN)
def test_without_a_device(omni2, install, checkpoint_dir, source):
    install(source)
    line, *_ = omni2(*chat(checkpoint_dir, "--record"))
    assert is_error_line(line) and BROKEN[source] in line


def test_a_recorded_question_is_answered(omni2, install, monkeypatch, checkpoint_dir, text_model):
    monkeypatch.setattr(Omni2, "load", lambda *_, **__: text_model)
    install(STAND_IN, spoken(AUDIO / "short_d.wav", before=0, after=2))
    code, out, notes = omni2(*chat(checkpoint_dir, "--record", "--no-wav"))
    assert code == 0 and out.strip() and "units" in notes

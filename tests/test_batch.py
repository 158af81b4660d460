"""Any number of conversations in a few slots: in order, in bounded memory, with failures."""

import dataclasses

import numpy as np
import pytest
import soundfile

from omni2_jax.generate.omni2 import join
from tests.support.conversations import GREEDY, clip

TINY = dataclasses.replace(GREEDY, max_new_tokens=3, max_flush_units=4)  # two steps each
SOUNDS = [soundfile.read(clip(name), dtype="float32")[0] for name in ("short_d", "synth_c")]


@pytest.fixture(scope="module")
def expected(text_model):
    """The answer to each sound alone."""
    answers = [text_model.answer(sound, options=TINY) for sound in SOUNDS]
    assert answers[0] != answers[1]
    return answers


@pytest.fixture
def short_queue(text_engine, monkeypatch):
    """Slots and queue hold nine conversations: twelve are too many for them."""
    monkeypatch.setattr(text_engine, "queue", 6)


def test_more_conversations_than_the_queue_holds(
    text_model, text_engine, short_queue, expected, monkeypatch
):
    """Each is encoded only when a slot is free for it."""
    encode, num_encoded = text_model.encode, 0

    def count(clips):
        nonlocal num_encoded
        assert None in text_engine.slots and not text_engine.waiting
        num_encoded += 1
        return encode(clips)

    monkeypatch.setattr(text_model, "encode", count)
    conversations = [SOUNDS[i % 2] for i in range(12)]
    streams = text_model.streams(conversations, options=TINY, slots=3)
    assert num_encoded == 3
    answers = [join(stream, spoken=False) for stream in streams]
    assert answers == [expected[i % 2] for i in range(12)]
    assert num_encoded == 12


def test_a_later_answer_first(text_model, text_engine, expected):
    """The answers before it are generated on the way and are delivered afterwards."""
    streams = text_model.streams([SOUNDS[0], SOUNDS[1]] * 3, options=TINY, slots=3)
    assert join(streams[5], spoken=False) == expected[1]
    assert [join(stream, spoken=False) for stream in streams[:5]] == (expected * 3)[:5]


def test_failures_are_raised_by_their_own_iterator(text_model, text_engine, expected):
    bad = np.full(1600, np.nan, np.float32)
    conversations = [SOUNDS[0], SOUNDS[1], SOUNDS[0], SOUNDS[1], bad, SOUNDS[0]]
    streams = text_model.streams(conversations, options=TINY, slots=3)
    for index, stream in enumerate(streams):
        if index == 4:
            with pytest.raises(ValueError, match="the samples given holds 1600 NaN"):
                next(stream)
        else:
            assert join(stream, spoken=False) == expected[index % 2 if index < 4 else 0]


def test_a_failure_at_once_leaves_nothing_behind(text_model, text_engine, expected):
    """The first three have slots at once, so that the second one's error is raised by the call."""
    with pytest.raises(ValueError, match=r"nowhere\.wav"):
        text_model.streams([SOUNDS[0], "nowhere.wav", SOUNDS[1]], options=TINY, slots=3)
    assert not any(text_engine.slots) and not text_engine.waiting


def test_answers_that_are_not_taken_do_not_block_the_engine(
    text_model, text_engine, short_queue, expected
):
    """12 conversations are dropped, one after its first reply: the next answer is the usual one."""
    streams = text_model.streams([SOUNDS[0]] * 12, options=TINY, slots=3)
    next(streams[0])
    streams[0].close()
    del streams
    (stream,) = text_model.streams([SOUNDS[1]], options=TINY, slots=3)
    assert join(stream, spoken=False) == expected[1]
    while any(text_engine.slots):
        text_engine.step()


def test_no_conversation(text_model):
    assert text_model.streams([]) == []

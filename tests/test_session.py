"""Conversations: what is kept from turn to turn, interruptions, too long conversations."""

import dataclasses
import itertools

import numpy as np
import pytest

from omni2_jax.generate.engine import GenerationError, QueueFullError
from omni2_jax.generate.session import Session, Turn
from omni2_jax.models.model import SPEECH
from tests.support.conversations import CASES, GREEDY, clip, pieces

A, B, C, SHORT = (clip(name) for name in ("speech_a", "speech_b", "synth_c", "short_d"))
QUICK = dataclasses.replace(GREEDY, max_new_tokens=12, max_flush_units=10)


@pytest.fixture
def session(text_model):
    """With a cache of 1280 positions: three turns fit, not four."""
    return text_model.session(options=QUICK, turns=1)


def from_scratch(model, session: Session, turns: int | None = None, options=QUICK) -> Session:
    """Another session that remembers the same (first) turns, but has nothing in its cache."""
    fresh = model.session(options=options, turns=1)
    fresh.turns = [
        dataclasses.replace(turn, answer=list(turn.answer)) for turn in session.turns[:turns]
    ]
    return fresh


def said(replies) -> tuple[str, list[int], np.ndarray]:
    replies = list(replies)
    samples = np.concatenate([reply.samples for reply in replies])
    return (
        "".join(reply.text for reply in replies),
        [unit for reply in replies for unit in reply.units],
        samples,
    )


def equal(a, b) -> bool:
    return a[:2] == b[:2] and np.array_equal(a[2], b[2])


def test_turns_go_on_from_the_cache(text_model, monkeypatch):
    """The first turn is the released answer. Later turns only compute their own positions.

    Their answers are those of the whole conversation computed from scratch.
    """
    session = text_model.session(options=GREEDY, turns=1)
    taken, submit = [], session.engine.submit

    def record(pieces, *arguments, **settings):
        taken.append(pieces)
        return submit(pieces, *arguments, **settings)

    monkeypatch.setattr(session.engine, "submit", record)
    text, units, _ = said(session.respond(A))
    assert (
        text == CASES["A"]["text"].strip()
        and "".join(f"<{unit}>" for unit in units) == CASES["A"]["prediction_units"]
    )
    for wav in (B, C):
        continued = said(session.respond(wav))
        whole = from_scratch(text_model, session, len(session.turns) - 1, GREEDY)
        assert equal(said(whole.respond(wav)), continued)
        assert whole.length == session.length and whole.turns[-1].answer == session.turns[-1].answer
    lengths = [sum(len(piece.ids) for piece in pieces) for pieces in taken]
    first, second, second_whole, third, third_whole = lengths
    for before, new in zip(session.turns, (second, third), strict=False):
        assert (
            new
            == 300 + len(text_model.tokenizer.continuation(0, session.has_ended(before)))
            < first
        )
    assert second_whole == first + len(session.turns[0].answer) + second
    assert third_whole == second_whole + len(session.turns[1].answer) + third


@pytest.mark.nightly  # tests/test_serve_realtime.py hears turns of a session
def test_speech_of_two_turns(model):
    """The same with sound: it depends on the units alone, and starts anew in every turn."""
    session = model.session(options=QUICK, turns=1)
    turns = [said(session.respond(wav)) for wav in (A, B)]
    for _, units, samples in turns:
        assert samples.size == 960 * len(units) > 0
    assert equal(said(from_scratch(model, session, turns=1).respond(B)), turns[1])


def test_interruption_keeps_what_was_said(text_model, session):
    """Two replies of A are delivered, though the engine is ahead of them.

    Only these two stay in the history, and the next turn follows them.
    """
    replies = session.respond(A)
    delivered = [next(replies), next(replies)]
    session.interrupt()
    assert list(replies) == []
    (turn,) = session.turns
    assert (
        text_model.tokenizer.decode(turn.answer) == "".join(reply.text for reply in delivered) != ""
    )
    assert len(turn.answer) == 2 * text_model.config.read and not any(session.engine.slots)
    assert equal(
        said(session.respond(B)), said(from_scratch(text_model, session, turns=1).respond(B))
    )


def test_leaving_the_loop_interrupts(session):
    for _ in session.respond(A):
        break
    assert session.stream is None and len(session.turns[0].answer) == session.engine.config.read
    for _ in session.respond(SHORT):
        session.interrupt()
        session.interrupt()
    assert [len(turn.answer) for turn in session.turns] == [3, 3]


def test_last_replies_unheard(text_model, session):
    """The engine has finished: what was not delivered is no part of the conversation."""
    replies = session.respond(A)
    delivered = [next(replies) for _ in range(3)]
    stream = session.stream
    while not stream.done:
        session.engine.step()
    session.interrupt()
    assert len(session.turns[0].answer) == 3 * text_model.config.read and len(delivered) == 3
    assert equal(
        said(session.respond(B)), said(from_scratch(text_model, session, turns=1).respond(B))
    )


def test_a_text_to_say(text_model, session):
    """It is the answer to the turn; the next turn goes on from it. Nothing else is said."""
    said(session.respond(A))
    text = "I did not hear <speech> in this."
    assert said(session.reply(session.hear(B), say=text))[0] == text
    assert session.has_ended(session.turns[-1])
    whole = from_scratch(text_model, session)
    assert equal(said(session.respond(C)), said(whole.respond(C)))
    for text, message in {
        " \n": "no text",
        "So<|im_end|>so": r"'<\|im_end\|>', the name of a special token",
        "word " * 2100: r"has \d+ tokens, at most 2048",
    }.items():
        with pytest.raises(ValueError, match=message):
            session.reply("?", say=text)
    assert session.stream is None and len(session.turns) == 3


def test_one_answer_at_a_time(session):
    replies = session.respond(A)
    next(replies)
    with pytest.raises(RuntimeError, match="not complete yet"):
        next(session.respond(B))
    session.interrupt()
    following = session.respond(B)
    next(following)
    replies.close()  # an answer that was interrupted long ago does not end the one after it
    assert session.stream is not None and len(list(following)) > 0


def test_two_sessions_share_an_engine(text_model, text_engine, session):
    """Reply by reply in turns, each is what it is alone."""
    expected = [said(session.respond(A)), said(session.respond(B))]
    ask = text_model.request(QUICK)
    one, two = (
        Session(text_model.hear, text_engine, text_model.tokenizer, ask, None) for _ in range(2)
    )
    first = list(one.respond(A))
    together = list(itertools.zip_longest(one.respond(B), two.respond(A)))
    assert equal(said(first), expected[0])
    assert equal(said(first for first, _ in together if first), expected[1])
    assert equal(said(other for _, other in together if other), expected[0])


# --- faults


def test_too_long_a_conversation(text_model, session):
    """Four spoken turns do not fit: the fourth is refused and changes nothing."""
    for wav in (A, B, C):
        said(session.respond(wav))
    length, turns = session.length, list(session.turns)
    with pytest.raises(
        ValueError,
        match=r"takes 1\d\d\d positions and its answer up to 12 more, .* has 1280; start a new",
    ):
        next(session.respond(A))
    assert session.length == length and session.turns == turns
    with pytest.raises(ValueError, match="expected 'error' or 'drop'"):
        text_model.session(options=QUICK, turns=1, overflow="forget")


def talk_until_full(session: Session) -> None:
    """Until "What else?" does not fit behind the turns in the cache."""
    for wav in (A, B, C):
        said(session.respond(wav))
    limit = session.engine.engine_config.llm_capacity - QUICK.max_new_tokens
    question = len(session.tokenizer.continuation(["What else?"], True))
    while session.length + question <= limit:
        said(session.reply("What else?"))


def test_oldest_turns_are_dropped(text_model, session):
    """The rest takes half of the cache, and later turns go on behind it."""
    session.overflow = "drop"
    talk_until_full(session)
    turns = list(session.turns)
    answer = said(session.reply("What else?"))
    kept = session.turns[:-1]
    assert kept and kept == turns[-len(kept) :]
    assert session.length <= 1280 // 2
    rest = text_model.session(options=QUICK, turns=1)
    rest.turns = list(kept)
    assert equal(said(rest.reply("What else?")), answer)
    said(session.reply("What else?"))
    assert session.turns[: len(kept)] == kept


def test_the_newest_turn_is_kept_if_it_fits(session):
    """Although it and the question take more than half of the cache."""
    session.overflow = "drop"
    for wav in (A, B, C):
        said(session.respond(wav))
    newest = session.turns[-1]
    said(session.respond(A))
    assert session.turns[:-1] == [newest] and session.length > 1280 // 2


def test_a_full_conversation_from_elsewhere(session):
    """Half of it is dropped at once, not only as much as must be."""
    session.overflow = "drop"
    turns = [Turn(["What else?"], [5, 6, 7]) for _ in range(200)]
    session.resume(turns)
    said(session.reply("And now?"))
    assert 0 < len(session.turns) - 1 < 200 and 1280 // 4 < session.length <= 1280 // 2


def test_turn_that_alone_is_too_long(text_model):
    session = text_model.session(
        options=dataclasses.replace(GREEDY, long_turns="split"), turns=1, overflow="drop"
    )
    with pytest.raises(ValueError, match="but the LLM's cache has 1280"):
        next(session.respond(np.zeros(16000 * 121, np.float32)))
    assert session.turns == [] and said(session.respond(A))[0] == CASES["A"]["text"].strip()


def test_bad_audio_changes_nothing(session):
    said(session.respond(A))
    for wav, message in (
        (np.full(1600, np.nan, np.float32), "NaN"),
        (np.zeros(0, np.float32), "empty"),
        ("nowhere.wav", "nowhere.wav"),
    ):
        with pytest.raises(ValueError, match=message):
            next(session.respond(wav))
    with pytest.raises(ValueError, match=r"31.00 s long; at most 30 s fit"):
        next(session.respond(np.zeros(16000 * 31, np.float32)))
    assert len(session.turns) == 1 and said(session.respond(B))[1]


def test_failed_answer_is_forgotten(text_model, session):
    """The next turn follows the turns before it; the cache is computed again."""
    said(session.respond(A))
    healthy, session.hear = (
        session.hear,
        lambda sound: [f.at[0, 0].set(np.nan) for f in healthy(sound)],
    )
    with pytest.raises(GenerationError):
        said(session.respond(C))
    session.hear = healthy
    assert len(session.turns) == 1 and session.prefix is None
    assert equal(
        said(session.respond(B)), said(from_scratch(text_model, session, turns=1).respond(B))
    )


def test_full_queue_loses_nothing(text_model, session, text_engine, monkeypatch):
    busy = Session(
        text_model.hear, text_engine, text_model.tokenizer, text_model.request(QUICK), None, "drop"
    )
    talk_until_full(busy)
    monkeypatch.setattr(text_engine, "queue", 0)
    with pytest.raises(QueueFullError):
        next(busy.reply("What else?"))  # which would have dropped the oldest turns
    monkeypatch.undo()
    answer = said(busy.reply("What else?"))
    session.turns = busy.turns[:-1]
    assert session.turns and equal(said(session.reply("What else?")), answer)


def test_a_newcomer_waits_for_the_step_of_those_who_speak(text_model, text_engine):
    """Its prompt is computed by the next steps, as many pieces as each of them may compute."""
    request = text_model.request(QUICK)
    session = Session(text_model.hear, text_engine, text_model.tokenizer, request, None)
    speaker = text_engine.submit(pieces(text_model, "A"), request, None)
    text_engine.step()
    session.turns = [Turn(text_model.hear(A), [1, 2]), Turn(text_model.hear(C), [3])]
    answer = session.reply(text_model.hear(B))
    (newcomer,) = text_engine.waiting
    assert newcomer.num_prefilled == 0 and len(newcomer.pieces) >= 3
    text_engine.step(1)
    assert newcomer.num_prefilled == 1
    assert said(answer) and list(speaker)


def test_interruption_while_waiting(text_model, text_engine, monkeypatch):
    """Ctrl-C before the turn has a slot: the turn stays in the history, without an answer."""
    session = Session(
        text_model.hear, text_engine, text_model.tokenizer, text_model.request(QUICK), None
    )
    said(session.respond(A))
    others = [
        text_engine.submit(pieces(text_model, "A"), text_model.request(QUICK), None)
        for _ in range(3)
    ]
    text_engine.admit()

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(text_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(session.respond(C))
    monkeypatch.undo()
    assert len(session.turns) == 2 and session.turns[1].answer == [] and session.stream is None
    for other in others:
        list(other)
    assert equal(
        said(session.respond(B)), said(from_scratch(text_model, session, turns=2).respond(B))
    )


@pytest.mark.parametrize("computed", [0, 1])
def test_turns_in_the_cache_outlive_an_interruption_while_waiting(
    text_model, text_engine, monkeypatch, computed
):
    """Even if some pieces of the prompt were computed. The next turn asks both questions."""
    request = text_model.request(QUICK)
    session = Session(text_model.hear, text_engine, text_model.tokenizer, request, None)
    said(session.respond(A))
    length = session.length
    speaker = text_engine.submit(pieces(text_model, "A"), request, None)
    text_engine.step()
    session.reply([*text_model.hear(C), *text_model.hear(B)])
    (newcomer,) = text_engine.waiting
    text_engine.step(computed)
    assert newcomer.num_prefilled == computed and newcomer.slot is None
    session.interrupt()
    assert session.length == length and len(session.turns) == 2 and not text_engine.waiting
    expected = from_scratch(text_model, session)
    taken, submit = [], text_engine.submit

    def record(pieces, *arguments, **settings):
        taken.extend(pieces)
        return submit(pieces, *arguments, **settings)

    monkeypatch.setattr(text_engine, "submit", record)
    assert equal(said(session.reply("And now?")), said(expected.reply("And now?")))
    assert sum(len(piece.ids) for piece in taken) + length < session.length
    assert list(speaker)


def test_text_turns_and_instructions(text_model):
    """Texts may stand beside spoken turns, and the system message is the session's.

    The ids in the cache equal those of the whole conversation written by the chat template.
    """
    session = text_model.session(options=QUICK, turns=1, instructions="Say <speech> in French.")
    said(session.reply("What is <speech>?"))
    said(session.respond(SHORT))
    said(session.reply("And now?"))
    tokenizer = text_model.tokenizer
    answers = [tokenizer.text.decode(turn.answer) for turn in session.turns]
    turns = ["What is <speech>?", answers[0], 1, answers[1], "And now?"]
    rendered = tokenizer.render(turns, session.instructions)
    assert rendered.count("<speech>") == 1 and "system" in rendered
    written = session.dialogue(session.turns[:2], "And now?")
    assert session.length == len(written) + len(session.turns[2].answer)
    assert written.count(SPEECH) == tokenizer.positions
    fresh = from_scratch(text_model, session, 2)
    fresh.instructions = session.instructions
    assert said(fresh.reply("And now?"))[0] == tokenizer.decode(session.turns[2].answer)


def test_long_instructions_have_room(text_model):
    """The cache that is made for a number of turns holds the instructions, too."""
    instructions = "Answer in French. " * 120
    tokens = len(text_model.tokenizer.answer(instructions))
    session = text_model.session(options=QUICK, turns=1, instructions=instructions)
    assert tokens > text_model.session(options=QUICK, turns=1).engine.engine_config.llm_capacity
    assert said(session.respond(SHORT))[0] and session.length > tokens


def test_truncate_forgets_what_was_not_heard(text_model):
    """The next turn follows the tokens that are kept, as if the answer had ended there."""
    session = text_model.session(options=GREEDY, turns=1)
    said(session.respond(A))
    length, answer = session.length, list(session.turns[0].answer)
    compiled = session.engine.compilations()
    assert len(answer) > 4
    session.truncate(4)
    assert session.turns[0].answer == answer[:4] and session.length == length - len(answer) + 4
    fresh = from_scratch(text_model, session, options=GREEDY)
    assert equal(said(session.respond(SHORT)), said(fresh.respond(SHORT)))
    session.truncate(10_000)
    assert session.length == fresh.length
    assert session.engine.compilations() == compiled  # others would have to wait

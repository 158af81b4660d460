"""The embedded model, asked as its users ask it: aloud, questions that it has not heard before."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.evaluate import word_errors
from omni2_jax.evaluate.tasks.spoken_qa import occurs
from omni2_jax.generate.omni2 import Answer, Omni2, join
from omni2_jax.generate.options import Options
from omni2_jax.generate.session import Session
from omni2_jax.recognisers import RecogniserOptions, open_recogniser
from omni2_jax.synthesize.grammar_file import read_grammar
from omni2_jax.synthesize.make_dialogues import limited
from omni2_jax.synthesize.records import TextTurn
from omni2_jax.synthesize.sampling import Sampler
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed"),
]
VOICE = "en-us+f5"  # held out in recipes/nano/voices.yaml
GREEDY = Options(temperature=0)
SUM = "What is seven plus two?"


@pytest.fixture(scope="module")
def nano() -> Omni2:
    return Omni2.load()


@pytest.fixture(scope="module")
def ask(tmp_path_factory) -> Callable[[str], Path]:
    """A question -> the recording in which espeak-ng asks it."""
    folder = tmp_path_factory.mktemp("questions")

    def ask(question: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.wav"
        subprocess.run(["espeak-ng", "-v", VOICE, "-w", path, question], check=True, timeout=60)
        return path

    return ask


def held_out(**wanted: int) -> list[TextTurn]:
    """So many questions of each split."""
    grammar = limited(read_grammar(ROOT / "recipes" / "nano" / "grammar.yaml"), 1)
    return [dialogue.turns[0] for dialogue in Sampler(grammar, wanted, seed=100)]


def answers(nano: Omni2, sounds: list[Path]) -> list[Answer]:
    """The answer to each question, several of them at the same time."""
    streams = nano.streams(sounds, options=GREEDY)
    return [join(replies, nano.config.flow is not None) for replies in streams]


def text(session: Session, sound: Path) -> str:
    return "".join(reply.text for reply in session.respond(sound))


def test_it_answers_questions_that_it_has_not_heard(ask):
    """Other words, other numbers, and both; in a voice that it has not heard either.

    It answers 17 of them rightly. A few may differ with the CPU's rounding.
    """
    asked = held_out(unseen_phrasing=7, unseen_values=7, unseen_both=6)
    found = answers(Omni2.load(speech=False), [ask(turn.question) for turn in asked])
    right = [
        turn.question
        for turn, answer in zip(asked, found, strict=True)
        if occurs(turn.answers, answer.text)
    ]
    assert len(right) >= 14, right


def test_a_conversation_of_two_turns(nano, ask):
    session = nano.session(options=GREEDY, turns=2)
    assert occurs(["is nine"], text(session, ask(SUM)))
    assert occurs(["is five"], text(session, ask("And minus four?")))


def test_it_says_what_it_does_not_know(nano, ask):
    answer = nano.answer(ask("Who won the football game last night?"), options=GREEDY)
    assert "do not know" in answer.text or "have not learned" in answer.text


def test_silence_is_no_question(nano):
    answer = nano.answer(np.zeros(recordings.INPUT_RATE, np.float32), options=GREEDY)
    assert answer.text == "I did not hear a question."


def test_an_interrupted_answer_does_not_disturb_the_next(nano, ask):
    session = nano.session(options=GREEDY, turns=2)
    replies = session.respond(ask("Count from one to nine, please."))
    next(replies)
    replies.close()
    assert occurs(["is nine"], text(session, ask(SUM)))


def test_answers_are_the_same_alone_and_beside_others(nano, ask):
    """And it speaks what it says, at about 0.3 s a word."""
    sounds = [ask("What is the capital of Spain?"), ask(SUM)]
    for sound, beside in zip(sounds, answers(nano, sounds), strict=True):
        alone = nano.answer(sound, options=GREEDY)
        assert (alone.text, alone.units) == (beside.text, beside.units)
        words = len(beside.text.split())
        assert beside.waveform is not None and np.abs(beside.waveform).max() > 0.1
        assert 0.1 < beside.waveform.size / recordings.OUTPUT_RATE / words < 1, beside.text


@pytest.mark.skipif("OMNI2_WHISPER" not in os.environ, reason="OMNI2_WHISPER names no model")
def test_what_it_speaks_is_understood(nano, ask):
    """Sums and differences, which it says clearly; it samples, so a word may be wrong."""
    recogniser = open_recogniser(os.environ["OMNI2_WHISPER"], RecogniserOptions(threads=1))
    questions = ("What is seven plus two?", "What is twelve minus five?", "Add three and eight.")
    errors = []
    for question in questions:
        answer = nano.answer(ask(question), options=Options(temperature=0, unit_temperature=0.5))
        heard = recogniser.transcribe(answer.waveform, recordings.OUTPUT_RATE)
        errors.append(word_errors.compare(answer.text, heard))
    assert word_errors.corpus_rate(errors).value < 40, errors  # per cent

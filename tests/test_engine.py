"""Many requests in one engine: each answer is what it is alone, whatever the other slots do."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.checkpoint.tokenizer import parse_units
from omni2_jax.config import Omni2Config
from omni2_jax.generate.engine import (
    GenerationError,
    QueueFullError,
    ResponseStream,
    failure,
)
from omni2_jax.generate.read_write_state import FAILED, FLUSHING, IDLE, READING
from omni2_jax.generate.streaming_step import StepOutput
from omni2_jax.models.model import abstract_model
from tests.support.conversations import CASES, Said, broken, pieces, request_of, submit

# Requests that differ in everything: greedy and sampled, with other keys, with one to six steps
# before they flush.
TURNS = [
    ("B", {}),
    ("A", {"temperature": 0.8, "top_p": 0.9, "seed": 3}),
    ("E", {}),
    ("C", {"temperature": 1.2, "top_k": 20, "unit_temperature": 1.0, "seed": 5}),
    ("D", {"unit_temperature": 1.0, "unit_top_k": 50, "seed": 5}),
]


@pytest.fixture(scope="module")
def alone(warm_text_engine, text_model):
    """What each case says by itself."""
    return {name: Said.by(submit(warm_text_engine, text_model, name)) for name in CASES}


def test_released_conversations_through_three_slots(engine, model):
    """All five queued at once: text and units as released, 40 ms of sound for every unit."""
    streams = {name: submit(engine, model, name) for name in CASES}
    for name, stream in streams.items():
        said, units = (
            Said.by(stream),
            parse_units(CASES[name]["prediction_units"], model.config.units),
        )
        assert model.tokenizer.decode(said.text) == CASES[name]["text"].strip()
        assert model.tokenizer.unit_text(said.speech) == CASES[name]["prediction_units"]
        assert said.samples.size == 960 * len(units)
        assert np.abs(said.samples).max() > 0.01 and np.isfinite(said.samples).all()


@pytest.mark.slow
def test_company_changes_nothing(engine, model):
    """Requests that join one after the other are bit by bit what they are alone.

    Beside them, one fails and one is cancelled.
    """

    def send(name: str, changes: dict) -> ResponseStream:
        return submit(engine, model, name, max_new_tokens=18, max_flush_units=20, **changes)

    alone = [Said.by(send(*turn)) for turn in TURNS]
    assert len({tuple(said.speech) for said in alone}) == len(TURNS)
    failing = engine.submit(
        [broken(piece) for piece in pieces(model, "A")], request_of(model, "A"), model.voice(None)
    )
    streams, cancelled = [], send("A", {})
    for turn in TURNS:
        streams.append(send(*turn))
        engine.step()
        engine.step()
        if len(streams) == 2:
            cancelled.cancel()  # in mid-speech; another turn takes its slot
    for stream, expected in zip(streams, alone, strict=True):
        assert Said.by(stream) == expected
    with pytest.raises(GenerationError, match="not finite"):
        list(failing)


def test_slots_read_flush_and_rest_in_the_same_step(text_engine, text_model, alone):
    """E's text ends in its first step."""
    streams = {name: submit(text_engine, text_model, name) for name in "EA"}
    text_engine.step()
    assert text_engine.state.language.phase.tolist() == [FLUSHING, READING, IDLE]
    for name, stream in streams.items():
        assert Said.by(stream) == alone[name]


def test_two_threads_iterate_over_two_streams(text_engine, text_model, alone):
    """The engine's lock makes each answer what it is alone."""
    streams = [submit(text_engine, text_model, name) for name in "ABE"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(Said.by, streams, timeout=120))
    assert answers == [alone[name] for name in "ABE"]


def test_next_step_is_dispatched_before_the_last_is_read(text_engine, text_model, monkeypatch):
    while text_engine.dispatched:
        text_engine.fetch()
    events, programs, fetch = [], text_engine.programs, text_engine.fetch

    def step(*arguments):
        events.append("dispatch")
        return programs.step(*arguments)

    monkeypatch.setattr(text_engine, "programs", dataclasses.replace(programs, step=step))
    monkeypatch.setattr(text_engine, "fetch", lambda: (events.append("fetch"), fetch())[1])
    outputs = list(submit(text_engine, text_model, "A"))
    assert events == ["dispatch"] + ["dispatch", "fetch"] * len(outputs)


def test_forced_texts(text_engine, text_model, alone):
    """Made to answer what it answers anyway, the model says the same, whatever it would sample.

    Beside them, one is sampled, and one is forced to say what another one says.
    """

    def force(name: str, text: str) -> ResponseStream:
        request = request_of(text_model, name, temperature=1.5, seed=9).saying(alone[text].text)
        return text_engine.submit(pieces(text_model, name), request, None)

    other, free = force("A", "C"), submit(text_engine, text_model, "B")
    for name, stream in {name: force(name, name) for name in CASES}.items():
        assert Said.by(stream) == alone[name]
    assert Said.by(free) == alone["B"]
    said = Said.by(other)
    assert said.text == alone["C"].text and said.speech != alone["C"].speech


# --- faults


def test_full_queue_is_refused(text_engine, text_model, alone, monkeypatch):
    monkeypatch.setattr(text_engine, "queue", 1)
    streams = []
    for name in "ECEE":
        streams.append(submit(text_engine, text_model, name))
        text_engine.admit()
    with pytest.raises(
        QueueFullError,
        match="1 requests are waiting for one of the 3 slots, and no more than 1 may",
    ):
        submit(text_engine, text_model, "A")
    for name, stream in zip("ECEE", streams, strict=True):
        assert Said.by(stream) == alone[name]


def test_a_cancelled_slot_goes_to_a_waiting_request(text_engine, text_model, alone):
    streams = [submit(text_engine, text_model, name) for name in "ABCDE"]
    output = next(iter(streams[0]))
    streams[0].cancel()
    streams[3].cancel()  # was only waiting
    text_engine.step()
    assert text_engine.slots == [streams[4], streams[1], streams[2]]
    assert output.text_tokens == alone["A"].text[:3] and list(streams[0]) == list(streams[3]) == []
    for name, i in {"B": 1, "C": 2, "E": 4}.items():
        assert Said.by(streams[i]) == alone[name]
    streams[1].cancel()  # over already


def test_a_long_prompt_does_not_hold_up_those_who_speak(text_engine, text_model, alone):
    """A piece of it between two of their steps; another one is given up halfway."""
    speaker = submit(text_engine, text_model, "A")
    text_engine.step()
    assert len(pieces(text_model, "B")) >= 2
    newcomers = [submit(text_engine, text_model, name) for name in "BB"]
    for count in range(1, len(pieces(text_model, "B"))):
        text_engine.step(1)
        assert newcomers[0].num_prefilled == count and newcomers[0].slot is None
        assert len(speaker.outputs) == count  # one for each step
    newcomers[0].cancel()
    for _ in pieces(text_model, "B"):
        text_engine.step(1)
    assert newcomers[1].slot is not None and not text_engine.waiting
    assert Said.by(speaker) == alone["A"] and Said.by(newcomers[1]) == alone["B"]
    assert list(newcomers[0]) == []


def test_nan_ends_one_slot(text_engine, text_model, alone):
    failing = text_engine.submit(
        [broken(piece) for piece in pieces(text_model, "A")],
        request_of(text_model, "A"),
        None,
        keep_prefix=True,
    )
    beside = submit(text_engine, text_model, "C")
    message = (
        "speech features of segment 1 of 1 are not finite .* speech encoder or adapter is at fault"
    )
    with pytest.raises(GenerationError, match=message):
        list(failing)
    assert failing.prefix is None
    assert Said.by(beside) == alone["C"]
    assert Said.by(submit(text_engine, text_model, "A")) == alone["A"]  # in the slot that failed


@pytest.mark.parametrize(
    ("phase", "part"), [(FAILED, "llm, fusion or speech_lm"), (READING, "flow or vocoder")]
)
def test_a_failure_names_the_parts_at_fault(text_model, phase, part):
    """The features are finite, the logits (phase FAILED) or the samples are not."""
    samples = np.zeros(3, np.float32) if phase == FAILED else np.array([0, np.nan, 0], np.float32)
    stream = ResponseStream(None, pieces(text_model, "A"), None, None, None, False, 0)
    error = failure(stream, StepOutput(phase, 0, [], [], samples))
    assert f"speech features were; the checkpoint's {part} is at fault" in str(error)
    assert failure(stream, StepOutput(READING, 0, [], [], np.zeros(3, np.float32))) is None


def test_a_turn_that_cannot_start_disturbs_no_other(text_engine, text_model, alone, monkeypatch):
    programs, bad = text_engine.programs, request_of(text_model, "A")

    def out_of_memory(*arguments, request, **piece):
        if request is bad:
            raise RuntimeError("out of memory")
        return programs.prefill(*arguments, request=request, **piece)

    monkeypatch.setattr(
        text_engine, "programs", dataclasses.replace(programs, prefill=out_of_memory)
    )
    beside = submit(text_engine, text_model, "C")
    failing = text_engine.submit(pieces(text_model, "A"), bad, None)
    behind = [submit(text_engine, text_model, name) for name in "EAB"]
    for name, stream in zip("CEAB", [beside, *behind], strict=True):
        assert Said.by(stream) == alone[name]
    with pytest.raises(RuntimeError, match="out of memory"):
        list(failing)


def test_turn_that_does_not_fit_is_refused(text_engine, text_model):
    (piece,), request = pieces(text_model, "A"), request_of(text_model, "A")
    long = dataclasses.replace(piece, ids=np.zeros(429, np.int32))
    with pytest.raises(ValueError, match=r"have 1 to 428 positions; these have \[429\]"):
        text_engine.submit([long], request, None)
    with pytest.raises(ValueError, match=r"these have \[\]"):
        text_engine.submit([], request, None)
    with pytest.raises(
        ValueError, match=r"may need \d+ positions, but the engine's llm_capacity is 1280"
    ):
        text_engine.submit([piece] * 20, request, None)
    endless = dataclasses.replace(request, max_flush=jnp.array([2000]))
    with pytest.raises(
        ValueError, match=r"may need 2285 positions, but the engine's speech_capacity is 1280"
    ):
        text_engine.submit([piece], endless, None)


# --- what a step costs


def test_step_touches_neither_host_nor_new_memory(engine, model):
    """No transfer, no compilation (the fixture checks that), and the state is updated in place."""
    stream = submit(engine, model, "A")
    engine.admit()
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            engine.state, _ = engine.programs.step(engine.params, engine.state)
    stream.cancel()
    compiled = engine.programs.step.lower(engine.params, engine.state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(engine.state)
    )


def test_few_leaves(engine):
    """Passing leaves takes time in every step. Their number does not depend on that of layers."""
    assert len(jax.tree.leaves(engine.state)) < 64
    real = abstract_model(Omni2Config().only("llm", "fusion", "speech_lm", "flow", "vocoder"))[1]
    assert len(jax.tree.leaves(real)) < 500

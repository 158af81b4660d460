"""What clients and the model may do wrong: nobody else notices."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import websockets
from starlette.responses import JSONResponse

from benchmarks import serve as benchmark
from benchmarks import soak
from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.serve import capacity
from omni2_jax.serve.access import Access
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support import http_api
from tests.support.conversations import GREEDY, clip
from tests.support.realtime import MANUAL, SECOND, ask, audio_of, converse, talk, until
from tests.support.server import base64_of, eventually, get, pcm, running

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=6, max_flush_units=10)
LIMITS = Limits(sessions=3, context=1000, unsent_bytes=2**20)


@pytest.fixture(scope="module")
def server(model, warm_engine):
    server = Server(model, OPTIONS, LIMITS)
    server.worker.start()
    yield server
    assert server.worker.stop(20)


address = http_api.address  # of the server above


def question(name: str):
    """A conversation of one spoken question -> the text and the audio of its answer."""

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        events = await ask(link, pcm(clip(name)))
        assert events[-1].response.status in ("completed", "incomplete")
        return answer_of(events)

    return conversation


def answer_of(events) -> tuple[str, bytes]:
    texts = [e.delta for e in events if e.type == "response.output_audio_transcript.delta"]
    return "".join(texts), audio_of(events)


@pytest.fixture(scope="module")
def alone(address):
    """The answer to a question when nobody else asks."""
    return talk(address, question("short_d"))


def test_the_time_of_a_step_is_measured(server):
    """Before the first client: every slot speaks, and is free afterwards."""
    engine = server.worker.engine
    seconds = capacity.step_seconds(engine)
    assert seconds > 0 and not any(engine.slots) and not engine.waiting
    assert "slower than real time" in capacity.describe(engine, 0.5)
    line = capacity.describe(engine, 0.1)
    assert line == "sessions at once: 3; 100 ms of computing for 400 ms of speech"


def test_as_many_sessions_as_speak_in_real_time(monkeypatch):
    """Numbers are doubled until a step takes too long; engines of other numbers are given up."""

    class Model:
        config = SimpleNamespace(write=10, max_prompt=900)

        def __init__(self):
            self.engines = {}

        def engine(self, options, positions, slots):
            assert positions == 900
            engine = SimpleNamespace(slots=slots, warm_up=lambda: self.allocate(slots))
            return self.engines.setdefault(EngineConfig(slots=slots), engine)

        def allocate(self, slots):
            assert sum(config.slots for config in self.engines) <= 1.5 * slots
            if slots > self.memory:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    for milliseconds, memory, most in ((50, 64, 4), (0.1, 64, 64), (500, 64, 1), (0.1, 8, 8)):
        step = milliseconds / 1000
        monkeypatch.setattr(capacity, "step_seconds", lambda engine, step=step: step * engine.slots)
        model = Model()
        model.memory = memory
        assert capacity.most_sessions(model, OPTIONS, 4096) == most
        assert [config.slots for config in model.engines] == [most]


def faulty(chance: random.Random) -> str:
    """An event that cannot be carried out."""
    values = [None, -1, 1e300, "*", [], {}, "\0", [[[]]], {"type": "message"}, {"audio": 7}]
    choices = [
        lambda: json.dumps(chance.choice(values)),
        lambda: '{"type": "session.update", "session": ' + "[" * chance.randrange(3000),
        lambda: json.dumps({"type": chance.choice(values)}),
        lambda: json.dumps(
            {"type": "session.update", "session": chance.choice([None, 1, [], "x"])}
        ),
        lambda: json.dumps(
            {"type": "input_audio_buffer.append", "audio": chance.choice(["*", "a", 3, None, []])}
        ),
        lambda: json.dumps({"type": chance.choice(["x", ""]), "event_id": "x" * 100}),
        lambda: json.dumps({"type": "conversation.item.create", "item": chance.choice(values)}),
        lambda: json.dumps({"type": "session.update", "session": {"instructions": "x" * 20_000}}),
        # In the wrong order: there is no item, no audio and no response.
        lambda: (
            '{"type": "conversation.item.truncate", "item_id": "q", "content_index": 0, '
            f'"audio_end_ms": {chance.randrange(10**6)}}}'
        ),
        lambda: '{"type": "input_audio_buffer.commit"}',
        lambda: '{"type": "response.cancel"}',
        lambda: json.dumps(
            {"type": "conversation.item.delete", "item_id": f"item_{chance.random()}"}
        ),
    ]
    return chance.choice(choices)()


def test_a_thousand_faulty_events(address, server, alone):
    """An `error` event each; this connection and the one beside it answer as ever."""
    chance, count = random.Random(0), 1000

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        for _ in range(count):
            await link.send_raw(faulty(chance))
        for number in range(count):
            event = await link.recv()
            assert event.type == "error", number
            assert "\n" not in event.error.message and "Traceback" not in event.error.message
        return answer_of(await ask(link, pcm(clip("short_d"))))

    async def both():
        return await asyncio.gather(
            converse(address, conversation), converse(address, question("short_d"))
        )

    assert asyncio.run(both()) == [alone, alone]


@pytest.mark.slow
def test_clients_that_vanish(address, server, alone):
    """At fifty random moments, two at a time. Those who stay hear what they hear alone.

    Nothing is left behind.
    """
    chance, threads = random.Random(1), threading.active_count()

    async def vanish(link):
        """Send the events of a spoken question, or some of them, and go away without a word."""
        remaining = chance.randrange(12)
        await link.session.update(session=MANUAL)
        await link.input_audio_buffer.append(audio=base64_of(pcm(clip("short_d"))))
        if chance.random() < 0.8:
            await link.input_audio_buffer.commit()
            await link.response.create()
            for _ in range(remaining):
                await link.recv()
        link._connection.transport.abort()

    async def leave() -> None:
        for _ in range(25):
            await converse(address, vanish)

    async def all_of_them():
        *_, stayed = await asyncio.gather(leave(), leave(), converse(address, question("short_d")))
        return stayed

    assert asyncio.run(all_of_them()) == alone
    eventually(lambda: server.clients == 0 and not any(server.worker.engine.slots))
    eventually(lambda: not server.connections and not server.worker.answers)
    assert talk(address, question("short_d")) == alone
    assert threading.active_count() <= threads + 8  # of asyncio's pool


@pytest.mark.slow
def test_a_client_that_reads_nothing(address, server, alone):
    """Its connection is closed once too much waits for it; the one beside it does not wait."""

    async def deaf(link):
        text = {"type": "input_text", "text": "x" * 16_000}
        item = {"type": "message", "role": "user", "id": "long", "content": [text]}
        await link.conversation.item.create(item=item)
        await until(link, "conversation.item.done")
        (connection,) = server.connections
        link._connection.transport.pause_reading()
        for _ in range(4000):
            await link.send_raw('{"type": "conversation.item.retrieve", "item_id": "long"}')
        beside = await converse(address, question("short_d"))
        while connection in server.connections:
            await asyncio.sleep(0.02)
        link._connection.transport.abort()
        return beside

    assert talk(address, deaf) == alone
    eventually(lambda: server.clients == 0)


@pytest.mark.slow
def test_numbers_that_are_not_finite(address, server, monkeypatch, caplog, alone):
    """One answer fails, with a line that names no path; the next one of the session does not.

    Nor does the one beside it, to a longer question.
    """
    encode = server.model.encode

    def broken(segments):
        if len(segments[0]) > INPUT_RATE:
            return encode(segments)
        return [jnp.asarray(features).at[7, 3].set(jnp.nan) for features in encode(segments)]

    async def conversation(link):
        """A question that fails and a healthy one -> events of the first, the second answer."""
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        with monkeypatch.context() as patch:
            patch.setattr(server.model, "encode", broken)
            events = await ask(link, pcm(clip("short_d")))
        return events, answer_of(await ask(link, pcm(clip("short_d"))))

    async def both():
        return await asyncio.gather(
            converse(address, conversation),
            converse(address, question("synth_c")),
        )

    undisturbed = talk(address, question("synth_c"))
    (events, later), beside = asyncio.run(both())
    (record,) = [record for record in caplog.records if record.name == "omni2_jax.serve"]
    line = logging.Formatter().format(record)
    assert "GenerationError" in line and "worker." in line
    assert "\n" not in line and "/" not in line  # neither a traceback nor a path
    failed = events[-1].response
    assert failed.status == "failed" and beside == undisturbed
    assert failed.status_details.error.message.endswith("the model's numbers were not finite")
    # The question is gone: it would make every later answer fail.
    assert "conversation.item.deleted" in [event.type for event in events]
    assert later == alone


def test_an_encoder_that_fails_once(address, server, monkeypatch, alone):
    """The turn that it did not hear goes; the next one of the conversation is answered."""

    def broken(segments):
        raise RuntimeError("out of memory")

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        with monkeypatch.context() as patch:
            patch.setattr(server.model, "encode", broken)
            failed = await ask(link, pcm(clip("short_d")))
        return failed, await ask(link, pcm(clip("short_d")))

    failed, later = talk(address, conversation)
    assert failed[-1].response.status == "failed"
    assert "conversation.item.deleted" in [event.type for event in failed]
    assert answer_of(later) == alone


@pytest.mark.slow
def test_a_device_that_fails(model, warm_engine, monkeypatch):
    """Clients are told, and the server ends: whoever watches it starts another one."""
    server = Server(model, OPTIONS, LIMITS)
    server.worker.start()

    def lost(pieces):
        raise RuntimeError("the device is lost: /dev/accel0")

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        monkeypatch.setattr(warm_engine, "step", lost)
        await link.input_audio_buffer.append(audio=base64_of(pcm(clip("short_d"))))
        await link.input_audio_buffer.commit()
        await link.response.create()
        events = []
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                events.append(await link.recv())
        return events

    with running(server, graceful=True) as address:
        events = talk(address, conversation)
        eventually(lambda: not server.worker.thread.is_alive())
    (done,) = (event.response for event in events if event.type == "response.done")
    assert done.status == "failed"
    assert done.status_details.error.message == "the server has failed and is shutting down"
    assert [event.error.code for event in events if event.type == "error"] == ["server_stopping"]
    assert "lost" in str(server.worker.failure)
    monkeypatch.undo()
    for stream in filter(None, warm_engine.slots):
        stream.cancel()


def test_clients_beyond_the_maximum_are_counted(address, tmp_path, capsys):
    """`benchmarks.serve`: those who are refused do not disturb the others, or make it last."""
    rows = tmp_path / "rows.jsonl"
    url = f"ws://{address}/v1/realtime?model=omni2"
    benchmark.main(
        [clip("short_d")], url, None, [5, 1], turns=2, pause=0.0, json_lines=rows, plot_file=None
    )
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    levels, turns = found[:2], found[2:]
    counts = [(row["clients"], row["completed"], row["refused"], row["failed"]) for row in levels]
    assert counts == [(1, 2, 0, 0), (5, 6, 2, 0)] and len(turns) == 8
    assert all(turn["audio_ttfp"] > 0 and 0 < turn["audio_duration"] < 2 for turn in turns)
    assert "largest number of clients that holds" in capsys.readouterr().out


def test_a_client_that_speaks_in_real_time(address, tmp_path):
    """`benchmarks.serve --vad`: the server finds the question's end, and is measured from there."""
    rows, url = tmp_path / "rows.jsonl", f"ws://{address}/v1/realtime?model=omni2"
    benchmark.main(
        [clip("speech_a")],
        url,
        None,
        [1],
        turns=1,
        pause=0.0,
        vad=True,
        json_lines=rows,
        plot_file=None,
    )
    level, turn = [json.loads(line) for line in rows.read_text().splitlines()]
    assert level["completed"] == 1 and 0 < turn["audio_ttfp"] < turn["audio_rtf"] * 60


@pytest.mark.slow
def test_a_mix_of_clients(address, monkeypatch):
    """`benchmarks.soak` for some seconds: nothing grows, answers are those of a client alone."""
    monkeypatch.setattr(soak, "CLIENTS", 2)
    monkeypatch.setattr(soak, "TEXT", "Hi.")  # this server says 6 tokens at most
    url = f"ws://{address}/v1/realtime?model=omni2"
    sound = soak.base64_of(clip("speech_a"))
    rows, counts = asyncio.run(soak.soak(url, os.getpid(), sound, 15))
    soak.check(rows)
    assert len(counts) >= 3 and sum(counts.values()) >= 4, counts
    for name, allowed in soak.ALLOWED.items():
        grown = [*rows[:-1], rows[-1] | {name: rows[-1][name] + 2 * allowed}]
        with pytest.raises(ValueError, match=f"{name} grew by"):
            soak.check(grown)


@pytest.mark.slow
def test_a_mix_of_clients_notices_another_answer(address, monkeypatch):
    """The soak fails as soon as a client gets something else than alone."""
    url = f"ws://{address}/v1/realtime?model=omni2"
    load = soak.Load(url, soak.base64_of(clip("speech_a")), time.monotonic() + 60)
    load.alone = dict.fromkeys(("talk", "listen", "complete"), "another")
    monkeypatch.setattr(soak, "KINDS", tuple(load.alone))
    with pytest.raises(RuntimeError, match="an answer differs from the same one alone"):
        asyncio.run(load.run(0))


def metrics(address: str) -> dict[str, float]:
    """What the server counts, by name and label."""
    lines = get(f"http://{address}/metrics")[1].splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_what_the_server_counts(address, server, alone, monkeypatch):
    """Connections, responses, first audio, faulty events, and those who are refused."""
    before = metrics(address)

    async def conversation(link):
        await link.send_raw("nothing")
        await until(link, "error")
        await question("short_d")(link)
        connected = metrics(address)["omni2_sessions"]
        with monkeypatch.context() as patch:
            patch.setattr(server, "limits", dataclasses.replace(LIMITS, sessions=1))
            return connected, await refused(address)

    connected, (error, seconds, code) = talk(address, conversation)
    assert (error["code"], error["retry_after_seconds"], code) == ("server_full", 5, 1013)
    assert seconds < 2 and "all sessions of this server (1) are in use" in error["message"]
    eventually(lambda: server.clients == 0)
    counted = {name: value - before.get(name, 0) for name, value in metrics(address).items()}
    responses = {
        name: value for name, value in counted.items() if re.match("omni2_responses_total", name)
    }
    assert connected == 1 and sum(responses.values()) == 1 and counted["omni2_sessions"] == 0
    for name in ("refused_total", "event_errors_total", "first_audio_seconds_count"):
        assert counted[f"omni2_{name}"] == 1, name
    assert counted["omni2_first_audio_seconds_sum"] > 0


async def refused(address: str) -> tuple[dict, float, int]:
    """A client too many: its error, after how many seconds it is closed, and with which code."""
    start = time.monotonic()
    async with websockets.connect(f"ws://{address}/v1/realtime?model=omni2") as link:
        event = json.loads(await link.recv())
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await link.recv()
    assert event["type"] == "error" and closed.value.rcvd
    return event["error"], time.monotonic() - start, closed.value.rcvd.code


def test_pages_of_others(address):
    """A WebSocket of a foreign page, or asked by a name that is not this machine's, is refused."""
    host, port = address.split(":")
    cases = {
        ("localhost", None): None,
        ("localhost", f"http://localhost:{port}"): None,
        ("localhost", "https://b.example"): 403,
        ("b.example", None): 403,
        ("b.example", f"http://b.example:{port}"): 403,
    }

    async def first(name, origin) -> str:
        url = f"ws://{name}:{port}/v1/realtime?model=omni2"
        async with websockets.connect(url, origin=origin, host=host, port=int(port)) as link:
            return json.loads(await link.recv())["type"]

    for (name, origin), status in cases.items():
        if status is None:
            assert asyncio.run(first(name, origin)) == "session.created"
        else:
            with pytest.raises(websockets.InvalidStatus) as refusal:
                asyncio.run(first(name, origin))
            assert refusal.value.response.status_code == status


def test_from_outside_without_keys():
    """Refused wherever the server listens, as others may start it; not with a key, and not here."""
    statuses, sent = {}, []

    async def app(scope, receive, send):
        await JSONResponse({})(scope, receive, send)

    async def send(message):
        sent.append(message)

    for keys in ((), ("a",)):
        access = Access(app, keys, ("https://a.example",))
        for host in ("127.0.0.1", "::1", "192.0.2.1", "2001:db8::1", None):
            headers = [(b"host", b"a.example"), (b"authorization", b"Bearer a")]
            scope = {"type": "http", "path": "/v1/models", "headers": headers}
            scope["server"] = host and (host, 80)
            asyncio.run(access(scope, None, send))
            statuses[keys, host] = sent[-2]["status"]
    assert {where for where, status in statuses.items() if status == 403} == {
        ((), "192.0.2.1"),
        ((), "2001:db8::1"),
        ((), None),
    }


def test_health_of_a_server_whose_model_has_ended(model, warm_engine):
    server = Server(model, OPTIONS, LIMITS)
    server.worker.start()
    with running(server) as address:
        assert get(f"http://{address}/healthz") == (200, '{"status":"ok"}')
        server.worker.stop(20)
        server.worker.stopping = False  # as if the thread had ended by itself
        assert get(f"http://{address}/healthz") == (503, '{"status":"stopping"}')


@pytest.mark.slow
def test_a_client_that_asks_too_much(address, server, alone):
    """More speech than a turn may have, more text than a conversation, more than can be heard."""

    def message(**content):
        return {"type": "message", "role": "user", "content": [content]}

    short = base64_of(pcm(clip("short_d")))

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        items = [message(type="input_audio", audio=base64_of(bytes(31 * SECOND)))]
        long = message(type="input_text", text="x" * 16_000)
        items += [long | {"content": 5 * long["content"]}]
        for item in items:
            await link.conversation.item.create(item=item)
        events = [(await until(link, "error"))[-1], (await until(link, "error"))[-1]]
        for _ in range(12):
            await link.conversation.item.create(item=message(type="input_audio", audio=short))
        for _ in range(12):
            await until(link, "conversation.item.done")
            assert all(len(one.hearings) <= LIMITS.hearings + 1 for one in server.connections)
        return [event.error for event in events]

    async def both():
        return await asyncio.gather(
            converse(address, conversation), converse(address, question("short_d"))
        )

    errors, beside = asyncio.run(both())
    assert "31.0 s, a turn at most 30 s" in errors[0].message
    assert errors[1].code == "conversation_full"
    assert beside == alone


@pytest.mark.parametrize(
    ("bound", "code"), [("idle_seconds", "idle_timeout"), ("session_seconds", "session_expired")]
)
def test_connections_end_after_a_time(server, address, monkeypatch, bound, code):
    """One whose client says nothing, and the longest one, whatever its client says."""
    monkeypatch.setattr(server, "limits", dataclasses.replace(LIMITS, **{bound: 0.5}))

    async def conversation(link):
        if bound == "session_seconds":
            await link.session.update(session=MANUAL)
        (*_, error) = await until(link, "error")
        with pytest.raises(websockets.ConnectionClosed):
            await link.recv()
        return error.error.code

    assert talk(address, conversation) == code
    eventually(lambda: not server.connections)


@pytest.mark.slow
def test_a_server_that_is_stopped(model, warm_engine, alone):
    """The answer in progress is finished; then the client is told."""
    server, begun = Server(model, OPTIONS, LIMITS), threading.Event()
    server.worker.start()

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await link.input_audio_buffer.append(audio=base64_of(pcm(clip("short_d"))))
        await link.input_audio_buffer.commit()
        await link.response.create()
        events = await until(link, "response.output_audio.delta")
        begun.set()
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                events.append(await link.recv())
        return events

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with running(server, graceful=True) as address:
            result = pool.submit(talk, address, conversation)
            assert begun.wait(60)
        events = result.result(60)
    errors = [event.error for event in events if event.type == "error"]
    assert [error.code for error in errors] == ["server_stopping"]
    assert "response.done" in [event.type for event in events]
    assert answer_of(events) == alone

"""The Realtime API, driven by OpenAI's own client."""

import asyncio
import base64
import dataclasses
import itertools
import json
import threading
from types import SimpleNamespace

import openai
import pytest
import websockets.sync.client

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support import http_api
from tests.support.conversations import answer, clip
from tests.support.realtime import MANUAL, SECOND, ask, audio_of, talk, until
from tests.support.server import base64_of, pcm

OPTIONS = http_api.OPTIONS


@pytest.fixture(scope="module")
def server(model, warm_engine):
    server = Server(model, OPTIONS, Limits(sessions=3, context=1000, idle_seconds=20))
    assert server.worker.engine is warm_engine  # nothing is compiled again
    server.worker.start()
    yield server
    assert server.worker.stop(20)


address = http_api.address  # of the server above


def kinds(events) -> list[str]:
    """The kinds of events in their order; repeated ones once."""
    names = [event.type for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def message(text: str) -> dict:
    """The item of a written question."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def test_push_to_talk(address, model):
    """A spoken question is answered as `Omni2.answer` does, with the events of the GA API."""

    async def conversation(link):
        # Many clients ask for transcripts by default, which need a recogniser.
        sound = {"turn_detection": None, "transcription": {"model": "gpt-4o-mini-transcribe"}}
        await link.session.update(session={"type": "realtime", "audio": {"input": sound}})
        (updated,) = await until(link, "session.updated")
        assert updated.session.audio.input.transcription is None
        return await ask(link, pcm(clip("short_d")))

    events = talk(address, conversation)
    assert kinds(events) == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        *kinds([e for e in events if e.type.endswith(".delta")]),
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    # A part is announced by an event of its own; clients append it to the item's content.
    for kind, is_over in {
        "response.output_item.added": False,
        "response.output_item.done": True,
    }.items():
        (event,) = [e for e in events if e.type == kind]
        assert bool(event.item.content) == is_over
    (done,) = [e for e in events if e.type == "response.output_audio_transcript.done"]
    deltas = [e.delta for e in events if e.type == "response.output_audio_transcript.delta"]
    assert "".join(deltas) == done.transcript != ""
    expected = answer(model, clip("short_d"), OPTIONS)
    assert done.transcript == expected.text
    assert len(audio_of(events)) == 2 * len(expected.waveform)
    assert events[-1].response.usage.input_tokens > model.config.speech_positions
    assert events[-1].response.status in ("completed", "incomplete")


@pytest.mark.slow
def test_turns_by_voice_activity(address):
    """The server notices the end of a spoken turn and answers; the second turn follows the first.

    The voice activity detector cuts the silence off, so that the question's item is shorter.
    """
    sound = pcm(clip("speech_a")) + bytes(SECOND)

    async def conversation(link):
        turns = []
        for _ in range(2):
            for start in range(0, len(sound), SECOND // 5):
                await link.input_audio_buffer.append(audio=base64_of(sound[start:][: SECOND // 5]))
            turns.append(await until(link, "response.done"))
        return turns

    for events in talk(address, conversation):
        names = kinds(events)
        order = ["speech_started", "speech_stopped", "committed"]
        assert names[:3] == [f"input_audio_buffer.{name}" for name in order]
        started, stopped, committed = events[:3]
        assert started.item_id == stopped.item_id == committed.item_id
        assert 0 <= started.audio_start_ms < stopped.audio_end_ms
        assert events[-1].response.status in ("completed", "incomplete")
        assert len(audio_of(events)) > SECOND // 4


@pytest.mark.slow
def test_barge_in(address, server):
    """Speech during an answer stops it; what was not heard is forgotten; the next turn goes on."""
    sound = pcm(clip("speech_a"))

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        await link.input_audio_buffer.append(audio=base64_of(sound))
        await link.input_audio_buffer.commit()
        await link.response.create(response={"max_output_tokens": "inf"})
        events = await until(link, "response.output_audio.delta")
        vad = {"type": "server_vad", "create_response": False}
        settings = {"type": "realtime", "audio": {"input": {"turn_detection": vad}}}
        await link.session.update(session=settings)
        await link.input_audio_buffer.append(audio=base64_of(sound[: 2 * SECOND]))
        events += await until(link, "response.done")
        item = events[-1].response.output[0].id
        await link.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=100)
        events += await until(link, "conversation.item.truncated")
        await link.conversation.item.retrieve(item_id=item)
        events += await until(link, "conversation.item.retrieved")
        await link.session.update(session=MANUAL)
        await link.input_audio_buffer.append(audio=base64_of(sound))
        await link.input_audio_buffer.commit()
        await link.response.create()
        await until(link, "input_audio_buffer.committed")
        return events, await until(link, "response.done")

    events, later = talk(address, conversation)
    (done,) = [event for event in events if event.type == "response.done"]
    names = [event.type for event in events]
    assert done.response.status == "cancelled"
    assert done.response.status_details.reason == "turn_detected"
    # Nothing of the answer is sent after the speech was noticed.
    after = names[names.index("input_audio_buffer.speech_started") :]
    assert not any(name.endswith(".delta") for name in after)
    heard = events[-1].item.content[0].transcript or ""
    said = "".join(e.delta for e in events if e.type == "response.output_audio_transcript.delta")
    assert said.startswith(heard) and len(heard) < len(said)
    assert later[-1].response.status in ("completed", "incomplete")


@pytest.mark.slow
def test_talking_on_before_the_answer(address, server, monkeypatch):
    """Who talks on while the model still hears the first turn gets one answer, to both turns."""
    sound = pcm(clip("speech_a")) + bytes(SECOND)
    encode, may_hear = server.model.encode, threading.Event()

    def slow(segments):
        assert may_hear.wait(60)
        return encode(segments)

    async def conversation(link):
        monkeypatch.setattr(server.model, "encode", slow)
        await link.input_audio_buffer.append(audio=base64_of(sound))
        await until(link, "response.created")
        await link.input_audio_buffer.append(audio=base64_of(sound))
        await until(link, "conversation.item.done")
        may_hear.set()
        (first,) = (await until(link, "response.done"))[-1:]
        events = await until(link, "response.done")
        (connection,) = server.connections
        return first.response, events, [item.role for item in connection.conversation.items]

    first, events, roles = talk(address, conversation)
    assert first.status == "cancelled" and first.output == []
    assert first.status_details.reason == "turn_detected"
    assert kinds(events)[0] == "response.created" and audio_of(events)
    assert events[-1].response.status in ("completed", "incomplete")
    assert roles == ["user", "user", "assistant"]


def test_text_turns_and_cancel(address):
    """A written question, answered in text; another one, cancelled."""

    async def conversation(link):
        await link.conversation.item.create(item=message("What is the sea?"))
        await link.response.create(response={"output_modalities": ["text"]})
        events = await until(link, "response.done")
        await link.conversation.item.create(item=message("And the moon?"))
        await link.response.create()
        await until(link, "response.created")
        await link.response.cancel()
        await link.response.create()  # nobody has to wait until the other one has ended
        cancelled = await until(link, "response.done")
        assert (await until(link, "response.done"))[-1].response.status != "cancelled"
        return events, cancelled

    events, cancelled = talk(address, conversation)
    (text,) = [event.text for event in events if event.type == "response.output_text.done"]
    assert text and not audio_of(events)
    usage = events[-1].response.usage
    assert usage.output_token_details.audio_tokens == 0
    assert usage.output_tokens == usage.output_token_details.text_tokens > 0
    assert cancelled[-1].response.status == "cancelled"


def test_a_turn_behind_a_response(address, model, server):
    """What the user says after `response.create` is a question of its own, even if that waits."""

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        sound = base64_of(pcm(clip("short_d")))
        await link.input_audio_buffer.append(audio=sound)
        await link.input_audio_buffer.commit()
        await link.response.create()
        await link.input_audio_buffer.append(audio=sound)
        await link.input_audio_buffer.commit()
        first = await until(link, "response.done")
        await link.response.create()
        second = await until(link, "response.done")
        (connection,) = server.connections
        return first, second, [item.role for item in connection.conversation.items]

    first, second, roles = talk(address, conversation)
    assert roles == ["user", "assistant", "user", "assistant"]
    (content,) = first[-1].response.output[0].content
    assert content.transcript == answer(model, clip("short_d"), OPTIONS).text
    assert second[-1].response.status in ("completed", "incomplete")


def test_a_conversation_that_is_full(address, server, monkeypatch):
    """Its oldest items go, and the client is told; what the system has written stays."""
    monkeypatch.setattr(server, "limits", dataclasses.replace(server.limits, items=4))

    async def conversation(link):
        system = {"type": "message", "role": "system", "content": [text_of("Rhyme.")]}
        await link.conversation.item.create(item=system)
        ids, deleted = [], []
        for text in ("What is the sea?", "And the moon?", "And the wind?"):
            await link.conversation.item.create(item=message(text))
            # Clients that are made for the API may write null for a default.
            await link.send_raw(json.dumps({"type": "response.create", "response": None}))
            for event in await until(link, "response.done"):
                if event.type == "conversation.item.added":
                    ids.append(event.item.id)
                elif event.type == "conversation.item.deleted":
                    deleted.append(event.item_id)
        (connection,) = server.connections
        return ids, deleted, [item.id for item in connection.conversation.items]

    ids, deleted, held = talk(address, conversation)
    assert len(ids) == 7 and deleted == ids[1:4] and held == [ids[0], *ids[4:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_g711(address, kind):
    """The formats of telephones: one byte for each of 8,000 samples a second."""

    async def conversation(link):
        audio = {"input": {"format": {"type": kind}}, "output": {"format": {"type": kind}}}
        audio["input"]["turn_detection"] = None
        await link.session.update(session={"type": "realtime", "audio": audio})
        await until(link, "session.updated")
        return await ask(link, bytes(range(100, 200)) * 80)

    events = talk(address, conversation)
    units = events[-1].response.usage.output_token_details.audio_tokens
    assert abs(len(audio_of(events)) - units * 320) <= 8_000 // 4


def test_settings(address, server):
    """Instructions are the system message; temperature and limit reach the model; one response may
    differ.
    """

    async def conversation(link):
        await link.session.update(
            session={
                "type": "realtime",
                "instructions": "Be brief.",
                "max_output_tokens": 3,
                "output_modalities": ["text"],
                "temperature": 0.5,
            }
        )
        (updated,) = await until(link, "session.updated")
        (connection,) = server.connections
        session, found, detector = connection.session, [], connection.listener.detector
        for kind in ("semantic_vad", "server_vad"):  # neither forgets what the user is just saying
            changes = {"turn_detection": {"type": kind, "interrupt_response": False}}
            await link.session.update(session={"type": "realtime", "audio": {"input": changes}})
            (changed,) = await until(link, "session.updated")
            assert changed.session.audio.input.turn_detection.type == kind
            assert connection.listener.detector is detector is not None
        system = {"type": "message", "role": "system", "content": [text_of("Rhyme.")]}
        await link.conversation.item.create(item=system)
        for changes in ({}, {"instructions": "Sing.", "temperature": 0, "max_output_tokens": 2}):
            user = {"type": "message", "role": "user", "content": [text_of("What is the sea?")]}
            await link.conversation.item.create(item=user)
            await link.send_raw(json.dumps({"type": "response.create", "response": changes}))
            done = (await until(link, "response.done"))[-1].response
            sampling = session.request.text
            tokens = done.usage.output_token_details.text_tokens
            found.append((session.instructions, float(sampling.temperature[0]), tokens))
            assert (done.status, done.status_details.reason) == ("incomplete", "max_output_tokens")
        return updated.session, found

    session, found = talk(address, conversation)
    assert (session.instructions, session.max_output_tokens) == ("Be brief.", 3)
    assert found == [("Be brief.\nRhyme.", 0.5, 3), ("Sing.\nRhyme.", 0.0, 2)]


def text_of(text: str) -> dict:
    return {"type": "input_text", "text": text}


def test_names_of_the_beta(address):
    """Flat settings, and the old names of events; a format of this response only."""
    settings = {
        "modalities": ["text", "audio"],
        "turn_detection": None,
        "input_audio_format": "pcm16",
        "output_audio_format": "g711_ulaw",
        "max_response_output_tokens": 6,
    }
    asked = [
        {"type": "input_audio_buffer.append", "audio": base64_of(pcm(clip("short_d")))},
        {"type": "input_audio_buffer.commit"},
    ]
    own_format = {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 24000}}}}
    url = f"ws://{address}/v1/realtime?model=omni2"
    with websockets.sync.client.connect(
        url, additional_headers={"OpenAI-Beta": "realtime=v1"}
    ) as link:

        def until_done(*sent: dict) -> list[dict]:
            for event in sent:
                link.send(json.dumps(event))
            got = [json.loads(link.recv(timeout=60))]
            while got[-1]["type"] != "response.done":
                got.append(json.loads(link.recv(timeout=60)))
            return got

        updated = {"type": "session.update", "session": settings}
        got = until_done(updated, *asked, {"type": "response.create"})
        other = until_done(*asked, {"type": "response.create", "response": own_format})
    names = {event["type"] for event in got}
    assert names >= {
        "conversation.item.created",
        "response.audio.delta",
        "response.audio.done",
        "response.audio_transcript.delta",
        "response.audio_transcript.done",
    }
    assert not any("output_audio" in name or name == "error" for name in names)
    for events, unit_bytes in ((got, 320), (other, 1920)):  # of 40 ms: 8 kHz, and 24 kHz of 16 bits
        deltas = [event["delta"] for event in events if event["type"] == "response.audio.delta"]
        units = events[-1]["response"]["usage"]["output_token_details"]["audio_tokens"]
        size = sum(len(base64.b64decode(delta)) for delta in deltas)
        assert abs(size - units * unit_bytes) <= 6.25 * unit_bytes


def test_a_transcript_grows(address, server, monkeypatch):
    """What the user says is sent while it is said, as far as two hearings agree on it."""
    words = "What is the sky like at night and why is it so"
    lengths = []

    def transcribe(samples, rate, language):
        assert rate == INPUT_RATE and language is None
        lengths.append(len(samples))
        count = int(2 * len(samples) / rate)
        return " ".join([*words.split()[:count], "hm"])  # the last word is not certain

    monkeypatch.setattr(server, "recogniser", SimpleNamespace(transcribe=transcribe))
    sound = 2 * pcm(clip("speech_a"))

    async def conversation(link):
        vad = {"type": "server_vad", "create_response": False}
        await link.session.update(
            session={"type": "realtime", "audio": {"input": {"turn_detection": vad}}}
        )
        events = await until(link, "session.updated")
        for start in range(0, len(sound), SECOND // 5):
            await link.input_audio_buffer.append(audio=base64_of(sound[start:][: SECOND // 5]))
            while server.is_transcribing:
                await asyncio.sleep(0.005)
        await link.input_audio_buffer.append(audio=base64_of(bytes(SECOND)))
        return events + await until(link, "conversation.item.input_audio_transcription.completed")

    events = talk(address, conversation)
    assert (
        events[0].session.audio.input.transcription.to_dict() == {}
    )  # no null: pipecat refuses it
    deltas = [event for event in events if event.type.endswith("transcription.delta")]
    (started,) = [event for event in events if event.type.endswith("speech_started")]
    assert len(deltas) >= 2 and {delta.item_id for delta in deltas} == {started.item_id}
    said = "".join(delta.delta for delta in deltas)
    assert words.startswith(said) and events[-1].transcript.startswith(said)
    growth = [later - earlier for earlier, later in itertools.pairwise(lengths[:-1])]
    assert min(growth) >= INPUT_RATE  # a second


def test_turns_that_wait_for_the_recogniser(address, server, monkeypatch):
    """Behind a slow one so many turns wait, others get an event; all become items."""
    may_hear = threading.Event()

    def transcribe(samples, rate, language):
        assert may_hear.wait(60) and language == "de"
        return "hello"

    monkeypatch.setattr(server, "recogniser", SimpleNamespace(transcribe=transcribe))
    monkeypatch.setattr(server, "limits", dataclasses.replace(server.limits, transcriptions=2))
    event = "conversation.item.input_audio_transcription"

    async def conversation(link):
        sound = {"turn_detection": None, "transcription": {"language": "de"}}
        await link.session.update(session={"type": "realtime", "audio": {"input": sound}})
        for _ in range(3):
            await link.input_audio_buffer.append(audio=base64_of(bytes(SECOND // 10)))
            await link.input_audio_buffer.commit()
        events = await until(link, f"{event}.failed")
        may_hear.set()
        return (
            events
            + await until(link, f"{event}.completed")
            + await until(link, f"{event}.completed")
        )

    events = talk(address, conversation)
    done = [e.item.id for e in events if e.type == "conversation.item.done"]
    (failed,) = [e.item_id for e in events if e.type == f"{event}.failed"]
    heard = [e.item_id for e in events if e.type == f"{event}.completed"]
    assert done == [*heard, failed]


def test_a_session_that_cannot_begin(address, server, monkeypatch):
    """The client is told why, and nothing is logged as a failure of the server."""

    def no_voice(name):
        raise EventError("there is no voice yet")

    monkeypatch.setattr(server.voices, "x_vector", no_voice)
    with websockets.sync.client.connect(f"ws://{address}/v1/realtime?model=omni2") as link:
        error = json.loads(link.recv())["error"]
    assert error["message"] == "there is no voice yet" and error["code"] == "invalid_value"


def test_what_can_be_stopped(address):
    """A cancel that names another response stops nothing; an answer that failed is incomplete.

    Its question, which is too long, is gone.
    """

    async def conversation(link):
        await link.conversation.item.create(item={"id": "long", **message("word " * 3000)})
        await link.response.create()
        failed = await until(link, "response.done")
        await link.session.update(session=MANUAL)
        await link.conversation.item.create(item=message("What is the sea?"))
        await link.response.create(response={"output_modalities": ["text"]})
        await until(link, "response.created")
        await link.response.cancel(response_id="resp_of_another_time")
        events = await until(link, "error")
        return failed, events + await until(link, "response.done")

    failed, events = talk(address, conversation)
    (item,) = [
        e.item for e in failed if e.type == "conversation.item.done" and e.item.role == "assistant"
    ]
    assert failed[-1].response.status == "failed" and item.status == "incomplete"
    assert "long" in [e.item_id for e in failed if e.type == "conversation.item.deleted"]
    (error,) = [event.error for event in events if event.type == "error"]
    assert error.code == "response_cancel_not_active"
    assert events[-1].response.status in ("completed", "incomplete")


# An event, the code of its error, and the message where it begins with what `param` is.
FAULTS = {
    "not JSON": ("{", "invalid_json"),
    "no object": ("[1]", "invalid_json"),
    "unknown": ('{"type": "session.destroy"}', "unknown_event"),
    "no type": ('{"event_id": "x"}', "unknown_event"),
    "a field is missing": ('{"type": "input_audio_buffer.append"}', "invalid_value"),
    "not base64": ('{"type": "input_audio_buffer.append", "audio": "*"}', "invalid_value"),
    "nothing to commit": (
        '{"type": "input_audio_buffer.commit"}',
        "input_audio_buffer_commit_empty",
    ),
    "nothing to answer": ('{"type": "response.cancel"}', "response_cancel_not_active"),
    "no such item": (
        '{"type": "conversation.item.delete", "item_id": "../../etc/passwd"}',
        "item_delete_invalid_item_id",
    ),
    "no such item to retrieve": (
        '{"type": "conversation.item.retrieve", "item_id": "q"}',
        "item_retrieve_invalid_item_id",
    ),
    "no such item before": (
        '{"type": "conversation.item.create", "previous_item_id": "q", "item": {"type": "message", '
        '"role": "user", "content": [{"type": "input_text", "text": "And?"}]}}',
        "item_create_invalid_item_id",
    ),
    "a response to something else": (
        '{"type": "response.create", "response": {"input": [{"type": "message"}]}}',
        "invalid_value",
    ),
    "audio of another rate": (
        '{"type": "session.update", "session": {"audio": {"input": {"format": '
        '{"type": "audio/pcm", "rate": 16000}}}}}',
        "invalid_value",
    ),
    "no language": (
        '{"type": "session.update", "session": {"audio": {"input": {"transcription": '
        '{"language": "../de"}}}}}',
        "invalid_value",
    ),
    "no such voice": (
        '{"type": "session.update", "session": {"audio": {"output": {"voice": "/etc/passwd"}}}}',
        "invalid_value",
    ),
    "a voice without its id": (
        '{"type": "session.update", "session": {"audio": {"output": {"voice": {"name": "x"}}}}}',
        "invalid_value",
        "session.audio.output.voice.id: Field required",
    ),
    "too many tokens": (
        '{"type": "session.update", "session": {"max_output_tokens": 99999}}',
        "invalid_value",
        "session.max_output_tokens: Input should be less than or equal to 4096",
    ),
    "a name that is too long": (
        '{"type": "response.create", "response": {"metadata": {"' + 65 * "x" + '": "y"}}}',
        "invalid_value",
        f"response.metadata.{65 * 'x'}.[key]: String should have at most 64 characters",
    ),
    "beyond the audio": (
        '{"type": "conversation.item.truncate", "item_id": "q", "content_index": 0, '
        '"audio_end_ms": 5}',
        "item_truncate_invalid_item_id",
    ),
}


def test_faulty_events(address):
    """Each gets an `error` event with one clear line; the connection goes on."""

    async def conversation(link):
        answers = {}
        for name, (text, *_) in FAULTS.items():
            await link.send_raw(text)
            answers[name] = await link.recv()
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        await link.send_raw('{"type": "session.destroy", "event_id": "mine"}')
        assert (await link.recv()).error.event_id == "mine"
        return answers

    answers = talk(address, conversation)
    for name, event in answers.items():
        assert event.type == "error" and event.error.code == FAULTS[name][1], name
        assert "\n" not in event.error.message and "Traceback" not in event.error.message
        for message in FAULTS[name][2:]:
            assert event.error.message == message
            assert event.error.param == message.partition(": ")[0]


def test_full_server(address):
    """A session too many is refused at once, with a time to wait; the others go on."""
    three = Limits().sessions - 1

    async def conversation(link):
        async def hold(others: int):
            if not others:
                with pytest.raises(AssertionError):  # the first event is no session
                    await asyncio.to_thread(talk, address, None)
                return
            client = openai.AsyncOpenAI(api_key="x", websocket_base_url=f"ws://{address}/v1")
            async with client.realtime.connect(model="omni2") as other:
                assert (await other.recv()).type == "session.created"
                await hold(others - 1)

        await hold(three - 1)
        await link.session.update(session=MANUAL)
        return await until(link, "session.updated")

    assert talk(address, conversation)

"""Chat completions, speech, voices and access rules, driven by OpenAI's own client."""

import asyncio
import base64
import dataclasses
import http.client
import io
import json

import numpy as np
import openai
import pytest
import soundfile

from omni2_jax.serve.chat_completions import Message, newest
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY, answer, clip
from tests.support.server import base64_of, eventually, get, running

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=12, max_flush_units=15)


@pytest.fixture(scope="module")
def server(model, warm_engine, tmp_path_factory):
    voices = tmp_path_factory.mktemp("server") / "voices"
    server = Server(model, OPTIONS, Limits(sessions=3, context=1000), voices=voices)
    server.worker.start()
    yield server
    assert server.worker.stop(20)


@pytest.fixture(scope="module")
def address(server):
    with running(server) as address:
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(api_key="unused", base_url=f"http://{address}/v1", max_retries=0)


def spoken(name: str) -> dict:
    data = base64_of(clip(name).read_bytes())
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"role": "user", "content": [part]}


def test_spoken_question_and_answer(client, model):
    """Text and samples are those of `Omni2.answer`."""
    expected = answer(model, clip("short_d"), OPTIONS)
    completion = client.chat.completions.create(
        model="omni2",
        messages=[spoken("short_d")],
        modalities=["text", "audio"],
        audio={"voice": "espeak", "format": "wav"},
    )
    audio = completion.choices[0].message.audio
    assert audio.transcript == expected.text
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)), dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(samples, np.clip(expected.waveform, -1, 1), atol=2 / 32768)
    # The next turn refers to the answer by its id.
    history = [spoken("short_d"), {"role": "assistant", "audio": {"id": audio.id}}]
    later = client.chat.completions.create(model="omni2", messages=[*history, spoken("synth_c")])
    turns = [clip("short_d"), expected.text, clip("synth_c")]
    assert later.choices[0].message.content == answer(model, turns, OPTIONS).text


@pytest.mark.slow
def test_streams_equal_the_whole_answer(client):
    """The same text and samples, piece by piece, as server-sent events."""
    settings = {"model": "omni2", "messages": [spoken("speech_a")], "modalities": ["text", "audio"]}
    settings["audio"] = {"voice": "espeak", "format": "pcm16"}
    whole = client.chat.completions.create(**settings).choices[0].message.audio
    texts, data = [], []
    for chunk in client.chat.completions.create(**settings, stream=True):
        audio = getattr(chunk.choices[0].delta, "audio", None)
        if audio:
            texts.append(audio.transcript)
            data.append(base64.b64decode(audio.data))
    assert len(data) > 1 and "".join(texts) == whole.transcript
    assert b"".join(data) == base64.b64decode(whole.data)


def test_written_conversation(client):
    """System message, texts and a limit of tokens; no audio."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the sea?"},
        {"role": "assistant", "content": "Water."},
        {"role": "user", "content": "And the moon?"},
    ]
    completion = client.chat.completions.create(
        model="omni2", messages=messages, max_completion_tokens=4
    )
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens_details.audio_tokens <= 20
    assert completion.choices[0].message.audio is None


def test_a_stream_is_admitted_once(server, client, monkeypatch):
    """It takes one place until its end or until its client leaves; others are refused."""
    monkeypatch.setattr(server, "limits", dataclasses.replace(server.limits, sessions=1))
    question = {"messages": [{"role": "user", "content": "What is the sea?"}], "model": "omni2"}
    with client.chat.completions.create(**question, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(**question)
        assert error.value.response.headers["Retry-After"] == "5"
        assert len(list(stream)) > 1
    eventually(lambda: server.clients == 0)
    with client.chat.completions.create(**question, stream=True) as stream:
        next(iter(stream))
    eventually(lambda: server.clients == 0 and not any(server.worker.engine.slots))


@pytest.mark.slow
def test_speech(client, model, warm_engine, monkeypatch):
    """The samples are those of `Omni2.speak` in every format."""
    text = "Good evening."
    with monkeypatch.context() as patch:
        patch.setattr(model, "engine", lambda options, prompt: warm_engine)
        expected = np.clip(model.speak(text, options=OPTIONS).waveform, -1, 1)
    wanted = {"model": "omni2", "input": text, "voice": "alloy"}
    for name, tolerance in {"wav": 2 / 32768, "flac": 2 / 32768, "mp3": 1, "opus": 1}.items():
        data = client.audio.speech.create(**wanted, response_format=name).content
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert rate in (24_000, 48_000) and abs(len(samples) * 24_000 / rate - len(expected)) < 3000
        length = min(len(samples), len(expected))
        if rate == 24_000:
            np.testing.assert_allclose(samples[:length], expected[:length], atol=tolerance)
    create = client.audio.speech.with_streaming_response.create
    with create(**wanted, response_format="pcm") as response:
        chunks = list(response.iter_bytes())
    pcm = np.frombuffer(b"".join(chunks), "<i2") / 32768
    np.testing.assert_allclose(pcm, expected, atol=2 / 32768)
    with create(**wanted, response_format="pcm", stream_format="sse") as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line]
    *deltas, done = lines
    assert b"".join(base64.b64decode(line["audio"]) for line in deltas) == b"".join(chunks)
    assert len(deltas) > 1 and done["usage"]["output_tokens"] * 960 == len(expected)


BAD_SPEECH = {
    "no text": ({"input": " "}, "no text to say"),
    "too long": ({"input": "word " * 20}, "says at most 12 at once"),
    "a special token": ({"input": "a<|im_end|>"}, "special token"),
    "unknown voice": ({"voice": "../x"}, "there is no voice"),
    "unknown format": ({"response_format": "aac"}, "response_format"),
    "faster": ({"speed": 2}, "speed"),
    "a stream of a container": ({"stream_format": "sse"}, "stream_format"),
}


@pytest.mark.parametrize("name", BAD_SPEECH)
def test_bad_speech(client, name):
    changes, expected = BAD_SPEECH[name]
    settings = {"model": "omni2", "input": "Good evening.", "voice": "alloy"} | changes
    with pytest.raises(openai.BadRequestError, match=expected):
        client.audio.speech.create(**settings)


@pytest.mark.slow
def test_voices(client, server, address):
    """Added from a recording with consent, used, and deleted; files only this user can read."""
    recording = clip("speech_a").read_bytes()

    def add(name="jane", consent="true", sample=recording):
        return client.audio.voices.create(name=name, consent=consent, audio_sample=sample)

    voice = add()
    assert (voice.id, voice.object) == ("jane", "audio.voice")
    folder = server.voices.folder
    assert [path.name for path in folder.iterdir()] == ["jane.npy"]
    assert (folder.stat().st_mode & 0o777, next(folder.iterdir()).stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    listed = json.loads(get(f"http://{address}/v1/audio/voices")[1])["data"]
    assert [entry["id"] for entry in listed] == ["espeak", "jane"]
    spoken = {
        name: client.audio.speech.create(
            model="omni2", input="Good evening.", voice=name, response_format="wav"
        ).content
        for name in ("espeak", "jane")
    }
    assert len(spoken["espeak"]) == len(spoken["jane"]) and spoken["espeak"] != spoken["jane"]
    for changes, message in {
        ("consent", "no"): "consent",
        ("name", "../jane"): "a name has",
        ("name", "jane"): "already",
        ("name", "espeak"): "already",
        ("sample", b"hello"): "the audio",
    }.items():
        with pytest.raises(openai.BadRequestError, match=message) as error:
            add(**{"name": "june", changes[0]: changes[1]})
        assert "/tmp" not in error.value.body["message"]
    link = http.client.HTTPConnection(address)
    link.request("POST", "/v1/audio/voices", b"hello")
    refusal = link.getresponse()
    assert refusal.status == 400 and b"a form" in refusal.read()
    assert client.audio.voices.delete("jane").deleted
    for name in ("jane", "espeak", "..%2Fx"):
        with pytest.raises(openai.NotFoundError):
            client.audio.voices.delete(name)
    assert not list(folder.iterdir())


BAD = {
    "no messages": ({"messages": []}, "messages"),
    "a question of too many recordings": (
        {"messages": [spoken("short_d") | {"content": 5 * spoken("short_d")["content"]}]},
        "the question has too many recordings",
    ),
    "the model's turn is last": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "last message",
    ),
    "too much text": (
        {"messages": 5 * [{"role": "user", "content": "x" * 16_000}]},
        "the messages have 80000 characters",
    ),
    "no audio": (
        {"messages": [spoken("short_d") | {"content": [{"type": "input_audio"}]}]},
        "input_audio",
    ),
    "not a recording": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "input_audio", "input_audio": {"data": "aGVsbG8="}}],
                }
            ]
        },
        "the audio",
    ),
    "unknown voice": (
        {
            "messages": [{"role": "user", "content": "a"}],
            "modalities": ["text", "audio"],
            "audio": {"voice": "../x", "format": "wav"},
        },
        "voice",
    ),
}


def test_a_history_of_many_recordings():
    """Older turns are left out with their answers; what the system says stays."""
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    recording = {"content": [{"type": "input_audio"}]}
    messages = [
        Message(role=role, **(recording if role == "user" else {"content": str(number)}))
        for number, role in enumerate(roles)
    ]
    for most, kept in {3: range(6), 2: (0, 3, 4, 5), 1: (0, 5)}.items():
        assert newest(messages, most) == [messages[number] for number in kept]
    with pytest.raises(EventError, match="the question has too many recordings"):
        newest(messages, 0)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name):
    """One clear line that names no path of the server."""
    settings, expected = BAD[name]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="omni2", **settings)
    message = error.value.body["message"]
    if "the messages have" in expected:
        assert (error.value.code, error.value.param) == ("invalid_value", "messages")
    assert expected in message and "\n" not in message and "/tmp" not in message


def test_keys_and_origins(server):
    """Without a key, or from a foreign page, nothing is served but the health check."""
    with running(server, keys=("secret",), origins=("https://a.example",)) as address:
        url = f"http://{address}"
        assert get(f"{url}/healthz") == (200, '{"status":"ok"}')
        assert get(f"{url}/v1/models")[0] == 401
        assert get(f"{url}/v1/models", Authorization="Bearer secreT")[0] == 401
        assert get(f"{url}/v1/models", Authorization="Bearer secret")[0] == 200
        assert "<title>omni2-jax</title>" in get(url)[1]
        for origin, status in (("https://b.example", 403), ("https://a.example", 200)):
            headers = {"Authorization": "Bearer secret", "Origin": origin}
            assert get(f"{url}/v1/models", **headers)[0] == status
            # What the browser asks before a page sends its key.
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            link = http.client.HTTPConnection(address)
            link.request("OPTIONS", "/v1/chat/completions", headers=asked)
            allowed = link.getresponse().headers["Access-Control-Allow-Origin"]
            assert (allowed == origin) == (status == 200)

        async def connect():
            client = openai.AsyncOpenAI(api_key="wrong", websocket_base_url=f"ws://{address}/v1")
            async with client.realtime.connect(model="omni2"):
                pass

        with pytest.raises(Exception, match="HTTP 403"):
            asyncio.run(connect())


def test_names_of_the_server(server):
    """A page whose own name leads to this machine is of no foreign origin; its name is unknown."""
    names = {"localhost:1": 200, "[::1]:1": 200, "a.example": 200, "b.example": 403, "[": 403}
    with running(server, origins=("https://a.example",)) as address:
        for name, status in names.items():
            assert get(f"http://{address}/v1/models", Host=name)[0] == status, name
        rebound = {"Host": "b.example", "Origin": "http://b.example"}
        assert get(f"http://{address}/v1/audio/voices", **rebound)[0] == 403
        for origin in ("null", "http://[", "x" * 1000):
            assert get(f"http://{address}/v1/models", Origin=origin)[0] == 403


def test_metrics_and_lists(address):
    """What monitoring and clients ask for first."""
    url = f"http://{address}"
    assert "omni2_first_audio_seconds_bucket" in get(f"{url}/metrics")[1]
    (model,) = json.loads(get(f"{url}/v1/models")[1])["data"]
    (voice,) = json.loads(get(f"{url}/v1/audio/voices")[1])["data"]
    assert model["object"] == "model" and voice["id"] == "espeak"

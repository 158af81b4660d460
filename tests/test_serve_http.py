"""Chat completions, speech, voices and access rules, driven by OpenAI's own client."""

import asyncio
import base64
import dataclasses
import http.client
import io
import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest
import soundfile
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from omni2_jax.generate.read_write_state import Request
from omni2_jax.generate.session import Reply
from omni2_jax.models import speaker
from omni2_jax.serve.access import Access
from omni2_jax.serve.audio_api import Speech
from omni2_jax.serve.chat_completions import Completion, Message, finish_reason, newest
from omni2_jax.serve.events import EventError
from omni2_jax.serve.http import Endpoint
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.realtime import MAX_RESPONSES
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY, answer, clip
from tests.support.realtime import MANUAL, talk, until
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


def recording(data: bytes, kind: str = "wav") -> dict:
    part = {"type": "input_audio", "input_audio": {"data": base64_of(data), "format": kind}}
    return {"role": "user", "content": [part]}


def spoken(name: str) -> dict:
    return recording(clip(name).read_bytes())


def sound_file(samples: np.ndarray, rate: int, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


SEA = {"role": "user", "content": "What is the sea?"}


def lines_of(response) -> list[dict]:
    """The server-sent events of a response, but for the last one of a chat completion."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


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
    deltas = [
        chunk.choices[0].delta.audio
        for chunk in client.chat.completions.create(**settings, stream=True)
    ]
    *deltas, last = filter(None, deltas)
    assert len(deltas) > 1 and "".join(audio.transcript for audio in deltas) == whole.transcript
    assert b"".join(base64.b64decode(audio.data) for audio in deltas) == base64.b64decode(
        whole.data
    )
    assert 0 <= last.expires_at - whole.expires_at < 60


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
    assert completion.usage.completion_tokens == 4
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 4
    assert completion.usage.completion_tokens_details is None
    assert completion.choices[0].message.audio is None


def test_a_stream_of_text(client):
    """Its deltas are the whole answer's text. At its end: why it ended, the usage, [DONE]."""
    settings = {"model": "omni2", "messages": [SEA], "max_completion_tokens": 7}
    whole = client.chat.completions.create(**settings)
    create = client.chat.completions.with_streaming_response.create
    for wanted in (True, False):
        with create(**settings, stream=True, stream_options={"include_usage": wanted}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        if wanted:
            last = chunks.pop()
            assert last["choices"] == [] and last["usage"] == whole.usage.to_dict()
        assert all(("usage" in chunk) == wanted and not chunk.get("usage") for chunk in chunks)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        texts = [choice["delta"].get("content", "") for choice in choices]
        assert len(texts) > 3 and "".join(texts) == whole.choices[0].message.content
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_speech_that_is_cut(client, server, monkeypatch):
    """The text ends by itself, the speech does not; whole, and as a stream."""

    def request(options):
        return Request.of(server.model.config, options, server.model.defaults, [355])

    monkeypatch.setattr(server.model, "request", request)
    settings = {"model": "omni2", "messages": [spoken("synth_c")]}
    written = client.chat.completions.create(**settings)
    assert written.choices[0].finish_reason == "stop"
    settings |= {"modalities": ["text", "audio"], "audio": {"voice": "espeak", "format": "pcm16"}}
    whole = client.chat.completions.create(**settings)
    said = whole.choices[0].message.audio
    assert said.transcript == written.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens_details.audio_tokens == OPTIONS.max_flush_units
    *replies, expiry, end = client.chat.completions.create(**settings, stream=True)
    assert end.choices[0].finish_reason == "length"
    assert not any(chunk.choices[0].finish_reason for chunk in (*replies, expiry))
    deltas = [chunk.choices[0].delta.audio for chunk in replies[1:]]
    assert "".join(audio.transcript for audio in deltas) == said.transcript
    assert b"".join(base64.b64decode(audio.data) for audio in deltas) == base64.b64decode(said.data)
    last = expiry.choices[0].delta.audio
    assert last.data is None and 0 <= last.expires_at - said.expires_at < 60
    later = [settings["messages"][0], {"role": "assistant", "audio": {"id": last.id}}, SEA]
    client.chat.completions.create(model="omni2", messages=later, max_completion_tokens=1)


@pytest.mark.parametrize(
    ("text_ended", "last_unit", "is_spoken", "reason"),
    [
        (True, 9, True, "stop"),
        (True, 8, True, "length"),
        (True, 8, False, "stop"),
        (False, 9, True, "length"),
    ],
)
def test_why_an_answer_ended(text_ended, last_unit, is_spoken, reason):
    session = SimpleNamespace(
        turns=[None],
        has_ended=lambda turn: text_ended,
        prefix=SimpleNamespace(last_speech_token=jax.numpy.array([last_unit])),
        tokenizer=SimpleNamespace(config=SimpleNamespace(tokens=SimpleNamespace(unit_eos=9))),
    )
    assert finish_reason(session, is_spoken) == reason


def test_an_mp3(client):
    """OpenAI's other format of a question, which must be read, too."""
    samples, rate = soundfile.read(clip("short_d"))
    question = recording(sound_file(samples, rate, "MP3"), "mp3")
    completion = client.chat.completions.create(
        model="omni2", messages=[question], max_completion_tokens=1
    )
    assert completion.usage.completion_tokens == 1


def test_messages_of_the_assistant(client):
    """A greeting before the first question is left out; messages in a row are one answer."""
    greeting = {"role": "assistant", "content": "Welcome!"}
    parts = [{"role": "assistant", "content": text} for text in ("Water.", " It is blue.")]
    joined = {"role": "assistant", "content": "Water. It is blue."}
    system = {"role": "system", "content": "Be brief."}
    settings = {"model": "omni2", "max_completion_tokens": 3}
    many, plain = (
        client.chat.completions.create(messages=messages, **settings)
        for messages in (
            [greeting, system, greeting, SEA, *parts, SEA],
            [system, SEA, joined, SEA],
        )
    )
    assert many.choices[0].message.content == plain.choices[0].message.content
    assert many.usage == plain.usage


def test_null_is_absent():
    """As openai-python's types have it."""
    fields = {"messages": [{"content": [{"type": "text", "text": "a"}], "role": "user"}]}
    nulls = {
        "messages": [
            {
                "content": [{"type": "text", "text": "a", "input_audio": None}],
                "role": "user",
                "audio": None,
            }
        ]
    }
    for name in Completion.model_fields:
        nulls.setdefault(name, None)
    expected = Completion.model_validate_json(json.dumps(fields))
    assert Completion.model_validate_json(json.dumps(nulls)) == expected
    nulls |= {"audio": {"voice": None, "format": None}, "stream_options": {"include_usage": None}}
    assert Completion.model_validate_json(json.dumps(nulls)) == expected
    speech = dict.fromkeys(Speech.model_fields) | {"input": "a"}
    assert Speech.model_validate_json(json.dumps(speech)) == Speech(input="a")


def test_sampling(client):
    """`seed` and `top_p` are those of a request."""

    def said(**settings) -> str:
        completion = client.chat.completions.create(
            model="omni2", messages=[SEA], max_completion_tokens=4, **settings
        )
        return completion.choices[0].message.content

    greedy, first = said(), said(temperature=2, seed=-1)
    assert said(temperature=2, seed=-1) == first != greedy
    assert said(temperature=2, seed=5) != first
    assert said(temperature=2, seed=-1, top_p=0) == greedy


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
}


@pytest.mark.parametrize("name", BAD_SPEECH)
def test_bad_speech(client, name):
    changes, expected = BAD_SPEECH[name]
    settings = {"model": "omni2", "input": "Good evening.", "voice": "alloy"} | changes
    with pytest.raises(openai.BadRequestError, match=expected):
        client.audio.speech.create(**settings)


def saying(monkeypatch, server, *samples: int) -> None:
    """Let the model answer with replies of so many samples, and a unit for each 960."""

    async def answer(session, question, say=None):
        async def replies():
            for size in samples:
                wave = np.sin(np.arange(size) / 9).astype(np.float32) / 2
                yield Reply("a", [7] * (size // 960), "", wave, [1])

        return replies()

    monkeypatch.setattr(server.worker, "answer", answer)


def test_a_stream_of_speech(client, server, monkeypatch):
    """Events with the default format, mp3, make up an mp3; with pcm they come one by one."""
    saying(monkeypatch, server, 0, 9600, 0, 4800)
    create = client.audio.speech.with_streaming_response.create
    settings = {"model": "omni2", "input": "Good evening.", "voice": "alloy"}
    for changes, kind, number in (({}, "MP3", 1), ({"response_format": "pcm"}, None, 2)):
        with create(**settings, **changes, stream_format="sse") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *deltas, done = lines_of(response)
        assert len(deltas) == number and done["type"] == "speech.audio.done"
        data = b"".join(base64.b64decode(line["audio"]) for line in deltas)
        if kind:
            file = soundfile.SoundFile(io.BytesIO(data))
            assert (file.format, file.frames) == (kind, 14_400)
        else:
            assert len(data) == 2 * 14_400
        usage = done["usage"]
        assert usage["output_tokens"] == 15 and usage["input_tokens"] > 1
        assert usage["total_tokens"] == usage["input_tokens"] + 15


@pytest.mark.parametrize("settings", [{}, {"response_format": "pcm"}])
def test_speech_without_sound(client, server, monkeypatch, settings):
    """An error rather than an empty file."""
    saying(monkeypatch, server, 0, 0)
    for stream_format in ("audio", "sse"):
        with pytest.raises(openai.InternalServerError, match="its speech LM wrote no unit"):
            client.audio.speech.create(
                model="omni2", input="a", voice="alloy", stream_format=stream_format, **settings
            )


def test_a_model_that_cannot_speak(client, server, monkeypatch):
    monkeypatch.setattr(server, "speaks", False)
    with pytest.raises(openai.BadRequestError, match="answers in text only") as error:
        client.chat.completions.create(
            model="omni2", messages=[SEA], modalities=["text", "audio"], audio={"voice": "alloy"}
        )
    assert error.value.param == "modalities"
    with pytest.raises(openai.BadRequestError, match="answers in text only"):
        client.audio.speech.create(model="omni2", input="a", voice="alloy")


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


@pytest.mark.slow
def test_recordings_of_any_length(server, goldens):
    """Each has the x-vector of the released encoder, and one program serves them all."""
    released, programs = np.load(goldens / "cosy2_decoder" / "campplus.npz"), set()
    for name in ("speech_a", "short_d", "synth_c"):
        x_vector = server.voices.embed(clip(name).read_bytes())
        np.testing.assert_allclose(x_vector, released[f"{name}_torch"], rtol=0, atol=1e-4)
        programs.add(speaker._embed._cache_size())
    assert len(programs) == 1


def test_recordings_that_are_too_short(server):
    data = io.BytesIO()
    soundfile.write(data, np.full(700, 0.1), 16_000, format="WAV")
    with pytest.raises(ValueError, match="700 samples is too short; at least 720"):
        server.voices.embed(data.getvalue())


BAD = {
    "no messages": ({"messages": []}, "messages"),
    "a question of too many recordings": (
        {"messages": [spoken("short_d") | {"content": 5 * spoken("short_d")["content"]}]},
        "the question has too many recordings",
    ),
    "the model's turn is last": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "does not end with the user's turn",
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
    "a bad mp3": ({"messages": [recording(b"\xff\xfb\x90\x64" + bytes(999), "mp3")]}, "the audio"),
    "a long mp3": (
        {"messages": [recording(sound_file(np.zeros(8000 * 33), 8000, "MP3"), "mp3")]},
        "at most 30 s fit",
    ),
    "two answers": ({"messages": [SEA], "n": 2}, "n: Input should be less than or equal to 1"),
    "an end of the client's": ({"messages": [SEA], "stop": ["sea"]}, "does not end answers"),
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
    """Older turns are left out; what the system says stays. Nobody asked for the first answer."""
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    recording = {"content": [{"type": "input_audio"}]}
    messages = [
        Message(role=role, **(recording if role == "user" else {"content": str(number)}))
        for number, role in enumerate(roles)
    ]
    for most, kept in {3: range(6), 2: (0, 2, 3, 4, 5), 1: (0, 4, 5)}.items():
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
    if "the messages have" in expected or "the audio" in expected or "30 s" in expected:
        assert (error.value.code, error.value.param) == ("invalid_value", "messages")
    assert expected in message and "\n" not in message and "/tmp" not in message


def test_keys_behind_a_prefix():
    """As where Ray Serve has a route prefix: the application's paths are what comes after it."""

    async def application(scope, receive, send):
        await PlainTextResponse("in")(scope, receive, send)

    client = TestClient(Access(application, ("secret",), ()), root_path="/omni")
    assert client.get("/omni/v1/models").status_code == 401
    assert client.get("/omni/v1/models", headers={"Authorization": "Bearer secret"}).text == "in"
    assert client.get("/omni/healthz").text == "in"


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
    assert json.loads(get(f"{url}/v1/models/{model['id']}")[1]) == model


def test_what_the_api_does_not_have(client, address):
    """An error object for a model, a path and a method that are not there."""
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-none")
    assert error.value.code == "model_not_found" and "gpt-none" in error.value.body["message"]
    for method, path, status in (
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat", 404),
        ("GET", "/v1/chat/completions", 405),
    ):
        link = http.client.HTTPConnection(address)
        link.request(method, path)
        response = link.getresponse()
        assert response.status == status
        error = json.loads(response.read())["error"]
        assert f"{method} {path}" in error["message"] and error["type"] == "invalid_request_error"
    assert get(f"http://{address}/nothing") == (404, "Not Found")


def limited(monkeypatch, server, **bounds) -> None:
    monkeypatch.setattr(server, "limits", dataclasses.replace(server.limits, **bounds))


def test_a_request_that_is_too_large(client, server, monkeypatch):
    limited(monkeypatch, server, body_bytes=1000)
    with pytest.raises(openai.APIStatusError, match="more than 1000 bytes") as error:
        client.chat.completions.create(
            model="omni2", messages=[{"role": "user", "content": "x" * 1000}]
        )
    assert (error.value.status_code, error.value.code) == (413, "request_too_large")


def test_a_request_that_takes_too_long(address, server, monkeypatch):
    """Its body does not come."""
    limited(monkeypatch, server, request_seconds=0.2)
    link = http.client.HTTPConnection(address)
    link.putrequest("POST", "/v1/chat/completions")
    link.putheader("Content-Length", "100")
    link.endheaders(b"{")
    response = link.getresponse()
    assert response.status == 408 and b"more than 0.2 s" in response.read()
    eventually(lambda: server.clients == 0)


def test_a_client_that_reads_nothing(server, monkeypatch):
    """Its response is given up."""
    limited(monkeypatch, server, request_seconds=0.2)

    async def endless():
        while True:
            yield b"data"

    async def answer(server, request):
        return StreamingResponse(endless())

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def connection():
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await Endpoint(server, answer)(scope, asyncio.Event().wait, send)

    asyncio.run(asyncio.wait_for(connection(), 20))
    assert server.clients == 0


def test_responses_of_a_connection_at_once(address, server):
    """While the model does nothing, those that are to be stopped add up to a bound."""
    go_on = threading.Event()

    async def conversation(link):
        await link.session.update(session=MANUAL)
        await until(link, "session.updated")
        server.worker.commands.put(go_on.wait)
        for _ in range(MAX_RESPONSES):
            await link.response.create()
            await link.response.cancel()
        await link.response.create()
        error = (await until(link, "error"))[-1].error
        go_on.set()
        for _ in range(MAX_RESPONSES):
            assert (await until(link, "response.done"))[-1].response.status != "completed"
        return error

    try:
        error = talk(address, conversation)
    finally:
        go_on.set()
    assert error.code == "conversation_already_has_active_response"

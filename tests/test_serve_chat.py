"""/v1/chat/completions and access rules, driven by OpenAI's own client."""

import asyncio
import base64
import dataclasses
import io
import json

import numpy as np
import openai
import pytest
import soundfile

from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY, answer, clip
from tests.support.server import base64_of, get, running

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=12, max_flush_units=15)


@pytest.fixture(scope="module")
def server(model, warm_engine):
    server = Server(model, OPTIONS, Limits(sessions=3, context=1000))
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


BAD = {
    "no messages": ({"messages": []}, "messages"),
    "the model's turn is last": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "last message",
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


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name):
    """One clear line that names no path of the server."""
    settings, expected = BAD[name]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="omni2", **settings)
    message = error.value.body["message"]
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

        async def connect():
            client = openai.AsyncOpenAI(api_key="wrong", websocket_base_url=f"ws://{address}/v1")
            async with client.realtime.connect(model="omni2"):
                pass

        with pytest.raises(Exception, match="HTTP 403"):
            asyncio.run(connect())


def test_metrics_and_lists(address):
    """What monitoring and clients ask for first."""
    url = f"http://{address}"
    assert "omni2_first_audio_seconds_bucket" in get(f"{url}/metrics")[1]
    (model,) = json.loads(get(f"{url}/v1/models")[1])["data"]
    (voice,) = json.loads(get(f"{url}/v1/audio/voices")[1])["data"]
    assert model["object"] == "model" and voice["id"] == "espeak"

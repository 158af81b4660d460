"""Texts are spoken, and voices are added and deleted, by OpenAI's own client."""

import base64
import http.client
import io
import json

import numpy as np
import openai
import pytest
import soundfile

from omni2_jax.generate.session import Reply
from omni2_jax.models import speaker
from tests.support import http_api
from tests.support.conversations import clip
from tests.support.http_api import OPTIONS, SEA
from tests.support.server import get

server, address, client = http_api.server, http_api.address, http_api.client


def lines_of(response) -> list[dict]:
    """The server-sent events of a response, but for the last one of a chat completion."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


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

"""Chat completions, whole and as streams, are driven by OpenAI's own client."""

import base64
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest
import soundfile

from omni2_jax.generate.read_write_state import Request
from omni2_jax.serve.audio_api import Speech
from omni2_jax.serve.chat_completions import Completion, Message, finish_reason, newest
from omni2_jax.serve.events import EventError
from tests.support import http_api
from tests.support.conversations import answer, clip
from tests.support.http_api import OPTIONS, SEA
from tests.support.server import base64_of

server, address, client = http_api.server, http_api.address, http_api.client


def recording(data: bytes, kind: str = "wav") -> dict:
    part = {"type": "input_audio", "input_audio": {"data": base64_of(data), "format": kind}}
    return {"role": "user", "content": [part]}


def spoken(name: str) -> dict:
    return recording(clip(name).read_bytes())


def sound_file(samples: np.ndarray, rate: int, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


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
    "a picture": (
        {"messages": [SEA | {"content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "messages.0.content.0.type: Input should be 'text' or 'input_audio'",
    ),
    "too many parts": (
        {"messages": [SEA | {"content": 17 * [{"type": "text", "text": "a"}]}]},
        "messages.0.content: List should have at most 16 items after validation, not 17",
    ),
    "a text that is too long": (
        {"messages": [SEA | {"content": "x" * 16_385}]},
        "messages.0.content: String should have at most 16384 characters",
    ),
    "no content": ({"messages": [SEA, SEA | {"content": 3}]}, "messages.1.content: Input should"),
    "a voice without its id": (
        {"messages": [SEA], "audio": {"voice": {"name": "x"}}},
        "audio.voice.id: Field required",
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
    if ": " in expected:
        assert error.value.param == expected.partition(": ")[0]
    assert expected in message and "\n" not in message and "/tmp" not in message

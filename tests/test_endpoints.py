"""The client of OpenAI-compatible endpoints, against a local stand-in that fails on demand."""

import io
import json
import socket

import pytest
import soundfile

from omni2_jax.endpoints import (
    AnswerError,
    Client,
    Endpoint,
    EndpointError,
    TooLongError,
    audio_message,
)
from tests.support.endpoints import CHAT, SPEECH, TRANSCRIPTIONS, Standin, serve

HELLO = [{"role": "user", "content": "Hello."}]


@pytest.fixture
def standin():
    with serve(reply=lambda messages: f" To {messages[-1]['content']} ") as server:
        yield server


def client(standin: Standin, model: str = "standin", **settings) -> Client:
    return Client(Endpoint(standin.url, model, **settings))


def test_chat_speech_and_transcription(standin):
    ask = client(standin)
    ask.check()
    assert ask.chat(HELLO, temperature=0.5, max_tokens=7, seed=3, json=True) == "To Hello."
    route, request = standin.requests[-1]
    assert route == CHAT and request["messages"] == HELLO and request["model"] == "standin"
    assert (request["temperature"], request["max_tokens"], request["seed"]) == (0.5, 7, 3)
    assert request["response_format"] == {"type": "json_object"}
    audio = ask.speech("Good day.", "jane", extra={"speed_factor": 2})
    assert standin.requests[-1][1]["voice"] == "jane"
    assert standin.requests[-1][1]["speed_factor"] == 2
    samples, rate = soundfile.read(io.BytesIO(audio))
    assert rate == 24000 and len(samples) / rate == pytest.approx(0.54)
    assert ask.transcribe(audio) == "Good day."
    assert standin.requests[-1][1]["language"] == "en"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_text_and_speech(standin, stream):
    standin.reply = lambda messages: messages[-1]["content"][0]["input_audio"]["data"]
    answer = client(standin).spoken([audio_message(b"sound")], voice="jane", stream=stream)
    assert answer.text == "c291bmQ=" and answer.audio == standin.tone(answer.text)
    assert answer.seconds > 0
    request = standin.requests[-1][1]
    assert request["modalities"] == ["text", "audio"]
    assert request["audio"] == {"format": "pcm16" if stream else "wav", "voice": "jane"}


@pytest.mark.parametrize("fault", ["429", "500", "cut", "malformed", "empty"])
def test_a_passing_fault_is_overcome(standin, fault):
    standin.faults[CHAT] = [fault]
    assert client(standin).chat(HELLO) == "To Hello."
    assert standin.count(CHAT) == 2


def test_a_slow_answer_is_asked_for_again(standin):
    standin.faults[CHAT], standin.slow_seconds = ["slow"], 1.0
    assert client(standin, timeout=0.3).chat(HELLO) == "To Hello."


LASTING = {  # fault -> the error, and words of it
    "429": (EndpointError, "is busy, after 2 repetitions still (429"),
    "503": (EndpointError, "is busy, after 2 repetitions still (503"),
    "500": (AnswerError, "the request failed (500"),
    "400": (AnswerError, "the request failed (400"),
    "401": (EndpointError, "refuses the key in OPENAI_API_KEY (401"),
    "404": (EndpointError, "has no model 'standin', or not this route (404"),
    "malformed": (AnswerError, "the answer cannot be read"),
    "empty": (AnswerError, "the reply is empty"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_is_one_line(standin, fault):
    standin.always[CHAT] = fault
    kind, words = LASTING[fault]
    with pytest.raises(kind) as error:
        client(standin, retries=2).chat(HELLO)
    assert words in str(error.value) and standin.url in str(error.value)
    assert "\n" not in str(error.value) and standin.count(CHAT) <= 3


def test_a_reply_that_was_cut_off_is_not_asked_again(standin):
    standin.always[CHAT] = "long"
    with pytest.raises(TooLongError, match="the reply is longer than 7 tokens"):
        client(standin).chat(HELLO, max_tokens=7)
    assert standin.count(CHAT) == 1


def test_answers_without_sound_or_text(standin):
    standin.always = {SPEECH: "empty", CHAT: "empty", TRANSCRIPTIONS: "empty"}
    with pytest.raises(AnswerError, match="the sound file is empty"):
        client(standin).speech("Hello.", "jane")
    for stream in (False, True):
        with pytest.raises(AnswerError, match="the reply has no audio"):
            client(standin).spoken([audio_message(b"sound")], stream=stream)
    assert client(standin).transcribe(b"RIFF") == ""  # nothing was said
    standin.always = {SPEECH: "malformed"}
    with pytest.raises(AnswerError, match="expected a sound file, got"):
        client(standin).speech("Hello.", "jane")


def test_a_server_that_is_not_there_is_found_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=rf"{url} cannot be reached: .*is the server running"):
        Client(Endpoint(url, "m")).check()


def test_the_check_names_a_wrong_model_and_a_wrong_key(standin, monkeypatch):
    with pytest.raises(EndpointError, match="has no model 'other'; it has standin"):
        client(standin, "other").check()
    standin.key = "secret"
    with pytest.raises(EndpointError, match="refuses the key in OPENAI_API_KEY"):
        client(standin).check()
    monkeypatch.setenv("MY_KEY", "secret")
    client(standin, key_variable="MY_KEY").check()
    standin.models = None  # the server does not list its models
    client(standin, "other", key_variable="MY_KEY").check()


def test_wrong_settings(standin):
    with pytest.raises(ValueError, match="'localhost:8000' is no endpoint; expected a URL"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY holds no key"):
        client(standin, key_variable="NO_SUCH_KEY")


def test_the_stand_in_repeats_itself():
    messages = [{"role": "user", "content": json.dumps({"a": 1})}]
    replies = set()
    for _ in range(2):
        with serve() as server:
            replies.add(client(server).chat(messages))
    assert len(replies) == 1

"""The server tells who may ask, lists what it has, and keeps its limits, whatever is asked."""

import asyncio
import dataclasses
import http.client
import json
import threading

import openai
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from omni2_jax.serve.access import Access
from omni2_jax.serve.http import Endpoint
from omni2_jax.serve.realtime import MAX_RESPONSES
from tests.support import http_api
from tests.support.realtime import MANUAL, talk, until
from tests.support.server import eventually, get, running

server, address, client = http_api.server, http_api.address, http_api.client


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


def test_a_stream_is_admitted_once(server, client, monkeypatch):
    """It takes one place until its end or until its client leaves; others are refused."""
    limited(monkeypatch, server, sessions=1)
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


SPEECH = {"input": "Good evening.", "response_format": "pcm"}
WRITTEN = {"messages": [http_api.SEA]}


@pytest.mark.parametrize(
    ("path", "body", "held"),
    [
        ("audio/speech", SPEECH, "step"),
        ("audio/speech", SPEECH, "submit"),
        ("chat/completions", WRITTEN, "submit"),
    ],
)
def test_an_answer_that_takes_too_long(address, server, monkeypatch, path, body, held):
    """It is interrupted: before its first sound, and even while it begins."""
    limited(monkeypatch, server, request_seconds=1)
    engine, go_on, begun, calls = server.worker.engine, threading.Event(), threading.Event(), []

    def watch(name):
        method = getattr(engine, name)

        def watched(*arguments, **settings):
            if calls or name == "submit":  # a step before it is of no answer
                calls.append(name)
                assert name != held or go_on.wait(60)
            return method(*arguments, **settings)

        monkeypatch.setattr(engine, name, watched)

    watch("submit")
    watch("step")
    try:
        while held not in calls:  # a slow machine may need more time to get there
            link = http.client.HTTPConnection(address)
            link.request("POST", f"/v1/{path}", json.dumps(body))
            assert link.getresponse().status == 408
        eventually(lambda: server.clients == 0)
    finally:
        go_on.set()
    server.worker.commands.put(begun.set)
    assert begun.wait(60)
    eventually(lambda: not (server.tasks or server.worker.answers or any(engine.slots)))
    assert calls.count("step") <= 3  # a whole answer takes 5 or more


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

"""Two replicas on Ray Serve: one is killed while both talk, the other one is stopped."""

import asyncio
import contextlib
import os
import signal
import socket

import openai
import psutil
import pytest
import websockets

from tests.support.conversations import clip
from tests.support.realtime import MANUAL, ask, audio_of, until
from tests.support.server import base64_of, get, pcm

pytest.importorskip("ray.serve")
import ray
from ray import serve

from omni2_jax.serve import replicas


@pytest.fixture(scope="module")
def address(checkpoint_dir):
    """Two replicas that take one session each, with a proxy that listens on all addresses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = replicas.Settings(
        checkpoint=checkpoint_dir,
        replicas=2,
        sessions=1,
        context=1000,
        max_new_tokens=12,
        max_flush_units=30,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
        serve.start(http_options=serve.HTTPOptions(host="0.0.0.0", port=port))
        serve.run(replicas.build(settings))
        yield f"127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def processes() -> list[int]:
    """The process ids of the replicas."""
    # Of a process that has ended and is not waited for, or is another user's, there is no title.
    found = psutil.process_iter(["cmdline"])
    titles = {child.pid: " ".join(child.info["cmdline"] or ()) for child in found}
    return [pid for pid, title in titles.items() if title.startswith("ray::ServeReplica")]


async def connected(client: openai.AsyncOpenAI):
    """A connection that was not refused; a replica that is full, or starts, is asked again."""
    while True:
        try:
            link = await client.realtime.connect(model="omni2").enter()
            if (await link.recv()).type == "session.created":
                await link.session.update(session=MANUAL)
                await until(link, "session.updated")
                return link
        except (websockets.InvalidStatus, websockets.ConnectionClosed):
            pass
        await asyncio.sleep(0.3)


async def begin(link) -> bytes:
    """Ask -> the first audio of the answer, most of which is not computed yet."""
    await link.input_audio_buffer.append(audio=base64_of(pcm(clip("short_d"))))
    await link.input_audio_buffer.commit()
    await link.response.create()
    return audio_of(await until(link, "response.output_audio.delta"))


async def asked(link):
    """The response to a question, and whether it was heard."""
    events = await ask(link, pcm(clip("short_d")))
    return events[-1].response, bool(audio_of(events))


async def killed(address: str) -> None:
    client = openai.AsyncOpenAI(
        api_key="unused", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )
    links = [await connected(client) for _ in range(2)]
    assert all([await begin(link) for link in links])
    before = processes()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    outcomes = await asyncio.gather(
        *(until(link, "response.done") for link in links), return_exceptions=True
    )
    lost = [isinstance(outcome, websockets.ConnectionClosed) for outcome in outcomes]
    assert sorted(lost) == [False, True]
    survivor = links[lost.index(False)]
    assert outcomes[lost.index(False)][-1].response.status != "failed"
    assert (await asked(survivor))[1]

    # The other one goes on, in the replica that Ray starts, with what was said so far.
    link = await connected(client)
    said = {"user": "Good evening.", "assistant": "Good evening to you."}
    for role, text in said.items():
        content = [{"type": "input_text" if role == "user" else "output_text", "text": text}]
        await link.conversation.item.create(
            item={"id": role, "type": "message", "role": role, "content": content}
        )
        await until(link, "conversation.item.done")
    response, is_heard = await asked(link)
    assert is_heard and response.status != "failed" and response.output
    for role, text in said.items():
        await link.conversation.item.retrieve(item_id=role)
        item = (await until(link, "conversation.item.retrieved"))[-1].item
        assert (item.role, item.content[0].text) == (role, text)
    await link.close()
    # The model has read the history: its prompt was longer than that of the question alone.
    fresh = await connected(client)
    alone, _ = await asked(fresh)
    assert response.usage.input_tokens > alone.usage.input_tokens + 5
    assert (await asked(survivor))[1]
    assert len(set(processes()) - set(before)) == 1
    for one in (survivor, fresh):
        await one.close()


async def stopped(address: str) -> None:
    client = openai.AsyncOpenAI(
        api_key="unused", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )
    links = [await connected(client) for _ in range(2)]
    await begin(links[0])
    await asyncio.to_thread(serve.delete, serve.status().applications.popitem()[0], False)
    told = await asyncio.gather(*map(rest, links))
    assert "response.done" in [event.type for event in told[0]]
    assert [event.error.code for events in told for event in events if event.type == "error"] == (
        2 * ["server_stopping"]
    )


async def rest(link) -> list:
    """All events until the connection is closed."""
    events = []
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            events.append(await link.recv())
    return events


def within(seconds: float, coroutine) -> None:
    async def bounded():
        async with asyncio.timeout(seconds):
            await coroutine

    asyncio.run(bounded())


def test_open_to_others_without_keys(address):
    """Whatever the proxy of Ray listens on, only this machine is answered."""
    assert get(f"http://{address}/healthz")[0] == 200
    assert get(f"http://{address}/v1/models")[0] == 200
    outside, port = ray.util.get_node_ip_address(), address.rpartition(":")[2]
    if outside.startswith("127."):
        pytest.skip("this machine has a loopback address only")
    status, text = get(f"http://{outside}:{port}/v1/models", Host="localhost")
    assert status == 403 and "without API keys" in text


def test_a_replica_is_killed(address):
    """Its session ends amid an answer and goes on elsewhere; the other one is not disturbed."""
    within(400, killed(address))


def test_replicas_are_stopped(address):
    """The answer in progress is finished; then all clients are told."""
    within(60, stopped(address))


def test_bad_settings(tmp_path):
    """Known before a replica is started."""
    with pytest.raises(ValueError, match="nothing is not an omni2-jax checkpoint"):
        replicas.build(replicas.Settings(checkpoint=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="holds no key"):
        (tmp_path / "keys").write_text("")
        replicas.build(replicas.Settings(checkpoint=tmp_path, key_file=tmp_path / "keys"))
    with pytest.raises(ValueError, match="gpu\n"):
        replicas.Settings.model_validate({"gpu": 1})
    with pytest.raises(ValueError, match="sessions"):
        replicas.Settings.model_validate({"sessions": "many"})


@pytest.mark.parametrize(("sessions", "requests"), [("auto", 64 + 16), ("3", 3 + 16)])
def test_requests_of_a_replica(checkpoint_dir, sessions, requests):
    """As many as the most sessions that it may find it can speak to, and some to be refused."""
    given = {"checkpoint": checkpoint_dir, "sessions": sessions}
    application = replicas.build(replicas.Settings.model_validate(given))
    assert application._bound_deployment.max_ongoing_requests == requests

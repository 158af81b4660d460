"""Two replicas on Ray Serve, one of which is killed while both talk."""

import asyncio
import os
import signal
import socket

import openai
import psutil
import pytest
import websockets

from tests.support.conversations import clip
from tests.support.realtime import MANUAL, ask, audio_of, until
from tests.support.server import get, pcm

pytest.importorskip("ray.serve")
import ray
from ray import serve

from omni2_jax.serve import replicas


@pytest.fixture(scope="module")
def address(checkpoint_dir):
    """Two replicas that take one session each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = replicas.Settings(
        checkpoint=checkpoint_dir, replicas=2, sessions=1, context=1000, max_new_tokens=12
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
        serve.start(http_options=serve.HTTPOptions(port=port))
        serve.run(replicas.build(settings))
        yield f"127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def processes() -> list[int]:
    """The process ids of the replicas."""
    titles = {child.pid: " ".join(child.cmdline()) for child in psutil.process_iter()}
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


async def asked(link) -> bytes:
    return audio_of(await ask(link, pcm(clip("short_d"))))


async def conversations(address: str) -> None:
    client = openai.AsyncOpenAI(
        api_key="unused", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )
    links = [await connected(client) for _ in range(2)]
    assert all([await asked(link) for link in links])
    before = processes()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    outcomes = await asyncio.gather(*map(asked, links), return_exceptions=True)
    lost = [isinstance(outcome, websockets.ConnectionClosed) for outcome in outcomes]
    assert sorted(lost) == [False, True]
    survivor = links[lost.index(False)]
    assert outcomes[lost.index(False)] and await asked(survivor)

    # The other one goes on, in the replica that Ray starts, with what was said so far.
    link = await connected(client)
    for role, kind in (("user", "input_text"), ("assistant", "output_text")):
        content = [{"type": kind, "text": "Good evening."}]
        await link.conversation.item.create(
            item={"type": "message", "role": role, "content": content}
        )
    assert await asked(link) and await asked(survivor)
    assert len(set(processes()) - set(before)) == 1


def test_a_replica_is_killed(address):
    """Its session ends with an error and goes on elsewhere; the other session is not disturbed."""
    assert get(f"http://{address}/healthz")[0] == 200

    async def bounded():
        async with asyncio.timeout(400):
            await conversations(address)

    asyncio.run(bounded())


def test_bad_settings(tmp_path):
    """Known before a replica is started."""
    with pytest.raises(ValueError, match="nothing is not an omni2-jax checkpoint"):
        replicas.build(replicas.Settings(checkpoint=tmp_path / "nothing"))
    with pytest.raises(ValueError, match="holds no key"):
        (tmp_path / "keys").write_text("")
        replicas.build(replicas.Settings(checkpoint=tmp_path, key_file=tmp_path / "keys"))
    with pytest.raises(ValueError, match="gpu\n"):
        replicas.Settings.model_validate({"gpu": 1})

"""A client of the Realtime API, OpenAI's own: connections, questions, and what is answered."""

import asyncio
import base64

import openai

from tests.support.server import base64_of

MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
SECOND = 2 * 24_000  # bytes


def talk(address: str, conversation, **settings):
    """Run `conversation(connection)` on a connection of OpenAI's client -> its result."""

    return asyncio.run(converse(address, conversation, **settings))


async def converse(address: str, conversation, key: str = "unused", **settings):
    """The same in a coroutine, for several clients at once."""
    client = openai.AsyncOpenAI(
        api_key=key,
        base_url=f"http://{address}/v1",
        websocket_base_url=f"ws://{address}/v1",
    )
    async with asyncio.timeout(120), client.realtime.connect(model="omni2", **settings) as link:
        first = await link.recv()
        assert first.type == "session.created"
        return await conversation(link)


async def until(link, *kinds: str) -> list:
    """The events up to the first of one of these kinds. An `error` event fails the test."""
    events = []
    while not events or events[-1].type not in kinds:
        events.append(await link.recv())
        assert events[-1].type != "error" or "error" in kinds, events[-1]
    return events


def audio_of(events) -> bytes:
    deltas = [event.delta for event in events if event.type == "response.output_audio.delta"]
    return b"".join(map(base64.b64decode, deltas))


async def ask(link, sound: bytes) -> list:
    """Ask by push-to-talk -> all events up to the end of the response."""
    for start in range(0, len(sound), SECOND // 5):
        await link.input_audio_buffer.append(audio=base64_of(sound[start : start + SECOND // 5]))
    await link.input_audio_buffer.commit()
    await link.response.create()
    return await until(link, "response.done")

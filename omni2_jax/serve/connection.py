"""The events of one WebSocket: those of the client are read in order, the server's are queued."""

import abc
import asyncio
import contextlib
import json

from starlette.websockets import WebSocket, WebSocketDisconnect

from omni2_jax.serve import events
from omni2_jax.serve.conversation import new_id
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits

# What Starlette raises where a client has gone or, TimeoutError among OSError, does not read.
GONE = (WebSocketDisconnect, RuntimeError, OSError)
FAREWELL_SECONDS = 2.0  # what the closing of a connection may take


class Connection(abc.ABC):
    """A client, and the tasks that work for it. Nothing waits for a client that does not read."""

    def __init__(self, socket: WebSocket, limits: Limits, is_beta: bool):
        """is_beta: whether events have the names of the API's beta. A coroutine must call this."""
        self.socket, self.limits, self.is_beta = socket, limits, is_beta
        self.unsent: asyncio.Queue[str | None] = asyncio.Queue()
        self.unsent_bytes = 0
        self.tasks: set[asyncio.Task] = set()
        self.sender = asyncio.create_task(self.send_events())

    @abc.abstractmethod
    async def receive(self, text: str | bytes) -> None:
        """Carry out one event of the client."""

    @property
    @abc.abstractmethod
    def is_busy(self) -> bool:
        """Whether the client is waiting for the server; it is then not idle."""

    async def read_events(self) -> None:
        """Carry out the client's events until the connection ends."""
        while not self.sender.done():
            reader = asyncio.ensure_future(self.socket.receive())
            done: set = set()
            while not done:
                done, _ = await asyncio.wait(
                    {reader, self.sender},
                    timeout=self.limits.idle_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and not self.is_busy:  # a client may listen to a long answer
                    break
            if reader not in done:
                reader.cancel()
                if self.sender not in done:
                    self.send_error(EventError("the session was idle", "idle_timeout"), None)
                return
            message = reader.result()
            if message["type"] == "websocket.disconnect":
                return
            await self.receive(message.get("text") or message.get("bytes") or "")

    def send(self, kind: str, **fields) -> None:
        """Queue an event for the client. If the client does not read, the connection is closed."""
        names = events.BETA_NAMES if self.is_beta else {}
        event = {"type": names.get(kind, kind), "event_id": new_id("event"), **fields}
        text = json.dumps(event)
        self.unsent_bytes += len(text)
        if self.unsent_bytes > self.limits.unsent_bytes:
            self.sender.cancel()  # it waits for a client that does not read
        else:
            self.unsent.put_nowait(text)

    def send_error(self, error: EventError, event_id: object) -> None:
        fields = {"type": "invalid_request_error", "code": error.code, "message": str(error)}
        fields |= {
            "param": error.param,
            "event_id": event_id if isinstance(event_id, str) else None,
        }
        self.send("error", error=fields)

    async def send_events(self) -> None:
        """Send queued events; end after None, or when the client is gone."""
        while (text := await self.unsent.get()) is not None:
            try:
                await self.socket.send_text(text)
            except GONE:
                return
            self.unsent_bytes -= len(text)

    def start_task(self, coroutine) -> asyncio.Task:
        """Run a coroutine beside the reader; it ends with the connection at the latest."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def close(self) -> None:
        """End the tasks, send what is queued, and close the socket."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.unsent.put_nowait(None)
        await asyncio.wait({self.sender}, timeout=1)
        self.sender.cancel()
        await say_farewell(self.socket)


async def say_farewell(socket: WebSocket, code: int = 1000, event: dict | None = None) -> None:
    """Send a last event and close the socket.

    It may be closed already, and a client that does not read takes no farewell.
    """
    with contextlib.suppress(*GONE):
        async with asyncio.timeout(FAREWELL_SECONDS):
            if event:
                await socket.send_json(event)
            await socket.close(code)

"""What the endpoints of plain HTTP share: admission, reading, errors, and answers as a stream."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from omni2_jax.generate.engine import QueueFullError
from omni2_jax.generate.session import Reply, Session
from omni2_jax.serve import faults
from omni2_jax.serve.errors import failure
from omni2_jax.serve.events import EventError, Fields
from omni2_jax.serve.server import FullError, Server
from omni2_jax.serve.worker import Answer, StoppedError

Body = TypeVar("Body", bound=Fields)


class TooLargeError(ValueError):
    """A request has more bytes than the server reads."""


class Endpoint:
    """An ASGI endpoint that is admitted once, until its response has been sent to its end.

    answer: makes the response. Its failures become the API's error objects.
    """

    def __init__(self, server: Server, answer: Callable[[Server, Request], Awaitable[Response]]):
        self.server, self.answer = server, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self.server.limits.request_seconds
        try:
            with self.server.admit():
                try:
                    async with asyncio.timeout(seconds):
                        response = await self.respond(Request(scope, receive))
                except TimeoutError:
                    response = failure(f"the request took more than {seconds:g} s", 408)
                async with asyncio.timeout(seconds):  # a client may read nothing
                    await response(scope, receive, send)
        except FullError as error:
            await refusal(self.server, error)(scope, receive, send)
        except (ClientDisconnect, TimeoutError):
            pass  # the client has gone

    async def respond(self, request: Request) -> Response:
        """The response to a request, or the error object of its failure."""
        try:
            return await self.answer(self.server, request)
        except ClientDisconnect:
            raise
        except QueueFullError as error:
            return refusal(self.server, error)
        except StoppedError as error:
            return failure(str(error), 503, "server_stopping")
        except TooLargeError as error:
            return failure(str(error), 413, "request_too_large")
        except EventError as error:
            return failure(str(error), 400, error.code, param=error.param)
        except ValueError as error:
            return failure(self.server.public_message(error), 400)
        except Exception as error:
            self.server.log_failure(error)
            return failure(self.server.public_message(error), 500)


def refusal(server: Server, error: Exception) -> JSONResponse:
    """The error of a full server, with the time to wait."""
    retry = {"Retry-After": str(server.limits.retry_seconds)}
    return failure(str(error), 429, "server_full", retry)


async def body_of(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body of a request as it comes. Raises TooLargeError behind its first `limit` bytes."""
    size = 0
    async for data in request.stream():
        size += len(data)
        if size > limit:
            raise TooLargeError(f"the request has more than {limit} bytes")
        yield data


async def read_json(server: Server, request: Request, kind: type[Body]) -> Body:
    """The body of a request as an object.

    Raises TooLargeError if it is too long, and EventError if it is malformed.
    """
    body = b"".join([data async for data in body_of(request, server.limits.body_bytes)])
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        is_json = error.errors()[0]["type"] != "json_invalid"
        place, wrong = faults.describe(error, from_json(body) if is_json else None)
        message = f"{place}: {wrong}" if place else wrong
        raise EventError(message, param=place or None) from None


async def counted(server: Server, answer: Answer) -> AsyncIterator[Reply]:
    """The replies of an answer, which the metrics count."""
    start, is_first = time.monotonic(), True
    try:
        async for reply in answer:
            if is_first and reply.samples.size:
                server.metrics.first_audio.observe(time.monotonic() - start)
                is_first = False
            yield reply
    except Exception:
        server.metrics.responses.labels("failed").inc()
        raise
    server.metrics.responses.labels("completed").inc()


@contextlib.contextmanager
def interrupting(server: Server, session: Session) -> Iterator[None]:
    """A block that waits for the answer of a session: the answer is interrupted if the block fails.

    So no answer goes on for a client that has left, or whose request takes too long.
    """
    try:
        yield
    except BaseException:
        server.start_task(server.worker.interrupt(session))
        raise


async def whole(server: Server, request: Request, session: Session, answer: Answer) -> list[Reply]:
    """All replies of an answer. If the client leaves, the answer is interrupted."""
    replies = []
    with interrupting(server, session):
        async for reply in counted(server, answer):
            replies.append(reply)
            if await request.is_disconnected():
                raise ClientDisconnect
    return replies


def sse(fields: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"


def failed_event(server: Server, error: Exception) -> str:
    """The server-sent event of an answer that fails when its head has been sent already."""
    server.log_failure(error)
    return sse({"error": {"message": server.public_message(error), "type": "server_error"}})


class AnswerStream(StreamingResponse):
    """A response that is sent while the answer of a session is generated.

    If the client leaves, the answer is interrupted.
    """

    def __init__(
        self,
        server: Server,
        session: Session,
        content: AsyncGenerator[str | bytes, None],
        media_type: str,
    ):
        super().__init__(content, media_type=media_type)
        self.server, self.session = server, session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.server.start_task(self.server.worker.interrupt(self.session))

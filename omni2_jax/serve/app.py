"""The routes of the server."""

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from omni2_jax.serve import audio_api, chat_completions, memory
from omni2_jax.serve.access import Access
from omni2_jax.serve.connection import say_farewell
from omni2_jax.serve.errors import failure
from omni2_jax.serve.http import Endpoint
from omni2_jax.serve.realtime import Realtime
from omni2_jax.serve.server import FullError, Server

PAGE = Path(__file__).parent / "page"
STOP_SECONDS = 20.0  # what answers in progress get to finish when the server is stopped
STEP_SECONDS = 2.0  # what the step in progress gets before the process ends
TRY_AGAIN_LATER = 1013  # WebSocket close code


def create_app(
    server: Server, keys: tuple[str, ...] = (), origins: tuple[str, ...] = ()
) -> Starlette:
    """The application. keys: API keys that clients must have one of; () is an open server.

    origins: web pages of these origins may use the server, besides its own pages.
    """

    started = int(time.time())
    endpoint = functools.partial(Endpoint, server)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(memory.keep_tidy())
        yield
        tidying.cancel()
        server.worker.stop(STEP_SECONDS)

    async def realtime(websocket: WebSocket) -> None:
        await serve_realtime(server, websocket)

    def entry() -> dict:
        return {"id": server.name, "object": "model", "owned_by": "omni2-jax", "created": started}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [entry()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != server.name:
            return failure(f"there is no model {name!r}", 404, "model_not_found", param="model")
        return JSONResponse(entry())

    async def misled(request: Request, error: Exception) -> Response:
        """The error object for a path or a method that the API does not have."""
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return failure(message, error.status_code, headers=error.headers)

    async def voices(request: Request) -> Response:
        return await audio_api.list_voices(server, request)

    async def health(request: Request) -> Response:
        alive = server.worker.thread.is_alive() and not server.worker.stopping
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    api = Starlette(
        routes=[
            WebSocketRoute("/realtime", realtime),
            Route("/chat/completions", endpoint(chat_completions.complete), methods=["POST"]),
            Route("/audio/speech", endpoint(audio_api.speak), methods=["POST"]),
            Route("/audio/voices", voices),
            Route("/audio/voices", endpoint(audio_api.add_voice), methods=["POST"]),
            Route("/audio/voices/{name}", endpoint(audio_api.delete_voice), methods=["DELETE"]),
            Route("/models", models),
            Route("/models/{name}", model),
        ],
        exception_handlers={HTTPException: misled},
    )
    return Starlette(
        routes=[
            Mount("/v1", api),
            Route("/healthz", health),
            Route("/metrics", metrics),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            # First: what a browser asks before a page's request has no key.
            Middleware(CORSMiddleware, origins, allow_methods=["*"], allow_headers=["*"]),
            Middleware(Access, keys=keys, origins=origins),
        ],
        lifespan=lifespan,
    )


class GracefulServer(uvicorn.Server):
    """Lets the answers in progress finish before it closes the connections."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server = server

    async def on_tick(self, counter: int) -> bool:
        """Stop when the model has failed: whoever watches this process starts another one."""
        if self.server.worker.failure:
            self.server.log_failure(self.server.worker.failure)
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A second Ctrl-C sets force_exit.
        await self.server.drain(STOP_SECONDS, lambda: self.force_exit)
        await super().shutdown(sockets)


async def serve_realtime(server: Server, websocket: WebSocket) -> None:
    """Serve one WebSocket, or refuse it at once if the server is full."""
    protocols = websocket.headers.get("sec-websocket-protocol", "").split(",")
    names = [name.strip() for name in protocols if name.strip()]
    is_beta = websocket.headers.get("openai-beta") == "realtime=v1" or (
        "openai-beta.realtime-v1" in names
    )
    await websocket.accept(subprotocol="realtime" if "realtime" in names else None)
    try:
        with server.admit():
            await Realtime(server, websocket, is_beta).run()
    except FullError as error:
        fields = {
            "type": "server_error",
            "code": "server_full",
            "message": str(error),
            "param": None,
            "event_id": None,
            "retry_after_seconds": server.limits.retry_seconds,
        }
        event = {"type": "error", "event_id": "event_0", "error": fields}
        await say_farewell(websocket, TRY_AGAIN_LATER, event)

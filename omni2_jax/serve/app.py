"""The routes of the server."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from omni2_jax.serve import chat_completions
from omni2_jax.serve.access import Access
from omni2_jax.serve.realtime import Realtime
from omni2_jax.serve.server import FullError, Server

PAGE = Path(__file__).parent / "page"
STOP_SECONDS = 20.0  # what answers in progress get to finish when the server is stopped
TRY_AGAIN_LATER = 1013  # WebSocket close code


def create_app(
    server: Server, keys: tuple[str, ...] = (), origins: tuple[str, ...] = ()
) -> Starlette:
    """The application. keys: API keys that clients must have one of; () is an open server.

    origins: web pages of these origins may use the server, besides its own pages.
    """

    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.worker.stop(STOP_SECONDS)

    async def realtime(socket: WebSocket) -> None:
        await serve_realtime(server, socket)

    async def completions(request: Request) -> Response:
        return await chat_completions.complete(server, request)

    async def models(request: Request) -> Response:
        entry = {
            "id": server.name,
            "object": "model",
            "owned_by": "omni2-jax",
            "created": started,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def voices(request: Request) -> Response:
        data = [{"id": name, "object": "voice", "name": name} for name in server.voices]
        return JSONResponse({"object": "list", "data": data})

    async def health(request: Request) -> Response:
        alive = server.worker.thread.is_alive() and not server.worker.stopping
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            WebSocketRoute("/v1/realtime", realtime),
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/audio/voices", voices),
            Route("/healthz", health),
            Route("/metrics", metrics),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(Access, keys=keys, origins=origins)],
        lifespan=lifespan,
    )


async def serve_realtime(server: Server, socket: WebSocket) -> None:
    """Serve one WebSocket, or refuse it at once if the server is full."""
    protocols = socket.headers.get("sec-websocket-protocol", "").split(",")
    names = [name.strip() for name in protocols if name.strip()]
    is_beta = socket.headers.get("openai-beta") == "realtime=v1" or (
        "openai-beta.realtime-v1" in names
    )
    await socket.accept(subprotocol="realtime" if "realtime" in names else None)
    try:
        with server.admit():
            await Realtime(server, socket, is_beta).run()
    except FullError as error:
        fields = {
            "type": "server_error",
            "code": "server_full",
            "message": str(error),
            "param": None,
            "event_id": None,
            "retry_after_seconds": server.limits.retry_seconds,
        }
        await socket.send_json({"type": "error", "event_id": "event_0", "error": fields})
        await socket.close(TRY_AGAIN_LATER, "server_full")

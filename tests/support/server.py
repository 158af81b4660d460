"""A server in a thread of the test's process, and what clients of the tests have in common."""

import base64
import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import soxr
import uvicorn

from omni2_jax.audio import recordings
from omni2_jax.serve.app import GracefulServer, create_app
from omni2_jax.serve.server import Server


@contextlib.contextmanager
def running(server: Server, port: int = 0, graceful: bool = False, **settings) -> Iterator[str]:
    """The address (host:port) of a server that is listening; its worker must have started.

    graceful: at the end, stop it as `omni2 serve` is stopped by a signal, the worker too.
    """
    listener = socket.create_server(("127.0.0.1", port))
    app = create_app(server, **settings)
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    uvicorn_server = GracefulServer(config, server) if graceful else uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds, which another thread brings about; a minute at most."""
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


def get(url: str, **headers: str) -> tuple[int, str]:
    """The status and the body of a GET request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def pcm(path, rate: int = 24_000) -> bytes:
    """A recording as 16-bit samples at 24 kHz, as microphones of browsers send it."""
    (samples,) = recordings.load_turn(path, "refuse")
    samples = soxr.resample(samples, recordings.INPUT_RATE, rate)
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()

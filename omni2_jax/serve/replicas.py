"""Servers on many devices behind one address, with Ray Serve (extra `ray`).

    serve run omni2_jax.serve.replicas:build checkpoint=/models/omni2-7b replicas=8 gpus=1

Each replica is a process with a server of its own. A WebSocket stays with its replica, and so does
the conversation. If a replica dies, its connections are closed, those of others are not; Ray starts
another one, and a client goes on by connecting again and sending its history. If Ray stops a
replica, answers in progress are finished, and clients are told (`server_stopping`).
"""

import asyncio
from pathlib import Path
from typing import Literal

import pydantic
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette

from omni2_jax.checkpoint import embedded
from omni2_jax.generate.omni2 import describe
from omni2_jax.generate.options import Options
from omni2_jax.serve import capacity, memory
from omni2_jax.serve.access import read_keys
from omni2_jax.serve.app import STOP_SECONDS, create_app
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server

# Requests beyond a replica's sessions still reach it: it refuses them at once and says how long to
# wait, and it answers /healthz. Ray Serve would let them wait.
SPARE_REQUESTS = 16
HEALTH_SECONDS = 5.0  # between two checks
STATE_SECONDS = 2.0  # between two questions whether Ray stops the replica
LEAVE_SECONDS = 10.0  # what all of this may take beside the answers in progress


class Settings(pydantic.BaseModel, extra="forbid"):
    """What `serve run` may set, as NAME=VALUE.

    gpus: of each replica. resources: others of each, as {"TPU": 4}, in a config file of Ray Serve.
    sessions: of each replica; "auto": every replica measures what its device can do. key_file:
    without it, only requests to a loopback address are answered, whatever `http_options` say.
    key_file, origins (separated by commas), recogniser and others: see `omni2 serve --help`.
    """

    checkpoint: Path | None = None
    replicas: pydantic.PositiveInt = 1
    gpus: pydantic.NonNegativeFloat = 0
    cpus: pydantic.NonNegativeFloat = 1
    resources: dict[str, float] = {}
    sessions: pydantic.PositiveInt | Literal["auto"] = "auto"
    context: int = pydantic.Field(4096, ge=512)
    max_new_tokens: int = pydantic.Field(256, ge=1, le=4096)
    max_flush_units: pydantic.PositiveInt = Options.max_flush_units
    key_file: Path | None = None
    origins: str = ""
    recogniser: str | None = None


@serve.ingress()
class Replica:
    """One server. Voices that clients add would be known to one replica only, so none is taken."""

    async def __init__(self, settings: Settings):
        checkpoint = embedded.or_embedded(settings.checkpoint, "checkpoint=CKPT")
        options = Options(
            max_new_tokens=settings.max_new_tokens, max_flush_units=settings.max_flush_units
        )
        sessions, context, recogniser = settings.sessions, settings.context, settings.recogniser
        if measured := sessions == "auto":
            limits = Limits(context=context)
        else:
            limits = Limits(sessions, context=context)
        self.settings = settings
        self.server = Server.load(checkpoint, options, limits, measured, recogniser=recogniser)
        self.server.worker.start()
        memory.settle()
        self.ending = asyncio.create_task(self.end_when_stopped())

    def __serve_build_asgi_app__(self) -> Starlette:
        keys = read_keys(self.settings.key_file) if self.settings.key_file else ()
        return create_app(self.server, keys, tuple(filter(None, self.settings.origins.split(","))))

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if not self.server.worker.thread.is_alive():
            raise RuntimeError("the model's thread has ended")

    async def end_when_stopped(self) -> None:
        """Once Ray stops this replica: finish the answers, tell the clients, end the connections.

        Ray waits until they have ended, and calls nothing of a replica before.
        """
        while not await asyncio.to_thread(is_stopping):
            await asyncio.sleep(STATE_SECONDS)
        await self.server.drain(STOP_SECONDS, lambda: False)
        for connection in self.server.connections:
            connection.unsent.put_nowait(None)


def is_stopping() -> bool:
    """Whether Ray is stopping the replica of this process; False if its controller is away."""
    context = serve.get_replica_context()
    try:
        client = _get_global_client()
        applications = client.get_serve_details()["applications"] if client else {}
    except (RayError, RayServeException):
        return False
    application = applications.get(context.app_name, {})
    if application.get("status") == "DELETING":  # and it lists no replicas
        return True
    deployment = application.get("deployments", {}).get(context.deployment, {})
    return any(
        replica["replica_id"] == context.replica_tag and replica["state"] == "STOPPING"
        for replica in deployment.get("replicas", [])
    )


def build(settings: Settings) -> serve.Application:
    """The application for `serve run`. Raises ValueError, before any replica, for bad settings."""
    if settings.key_file:
        read_keys(settings.key_file)
    sessions = capacity.MOST if settings.sessions == "auto" else settings.sessions
    describe(embedded.or_embedded(settings.checkpoint, "checkpoint=CKPT"), decoder=True)
    deployment = serve.deployment(
        Replica,
        name="omni2",
        num_replicas=settings.replicas,
        max_ongoing_requests=sessions + SPARE_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=STOP_SECONDS + LEAVE_SECONDS,
        ray_actor_options={
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            "resources": settings.resources,
        },
    )
    return deployment.bind(settings)

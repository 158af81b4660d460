"""Servers on many devices behind one address, with Ray Serve (extra `ray`).

    serve run omni2_jax.serve.replicas:build checkpoint=/models/omni2-7b replicas=8 gpus=1

Each replica is a process with a server of its own. A WebSocket stays with its replica, and so does
the conversation. If a replica dies, its connections are closed, those of others are not; Ray starts
another one, and a client goes on by connecting again and sending its history.
"""

from pathlib import Path

import pydantic
from ray import serve
from starlette.applications import Starlette

from omni2_jax.checkpoint import embedded
from omni2_jax.generate.omni2 import describe
from omni2_jax.generate.options import Options
from omni2_jax.serve import memory
from omni2_jax.serve.access import read_keys
from omni2_jax.serve.app import create_app
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server

# Requests beyond a replica's sessions still reach it: it refuses them at once and says how long to
# wait, and it answers /healthz. Ray Serve would let them wait.
SPARE_REQUESTS = 16
HEALTH_SECONDS = 5.0  # between two checks


class Settings(pydantic.BaseModel, extra="forbid"):
    """What `serve run` may set, as NAME=VALUE.

    gpus: of each replica. resources: others of each, as {"TPU": 4}, in a config file of Ray Serve.
    key_file, origins (separated by commas), recogniser and others: see `omni2 serve --help`.
    """

    checkpoint: Path | None = None
    replicas: pydantic.PositiveInt = 1
    gpus: pydantic.NonNegativeFloat = 0
    cpus: pydantic.NonNegativeFloat = 1
    resources: dict[str, float] = {}
    sessions: pydantic.PositiveInt = 4
    context: int = pydantic.Field(4096, ge=512)
    max_new_tokens: int = pydantic.Field(256, ge=1, le=4096)
    max_flush_units: pydantic.PositiveInt = Options.max_flush_units
    key_file: Path | None = None
    origins: str = ""
    recogniser: str | None = None


@serve.ingress()
class Replica:
    """One server. Voices that clients add would be known to one replica only, so none is taken."""

    def __init__(self, settings: Settings):
        checkpoint = embedded.or_embedded(settings.checkpoint, "checkpoint=CKPT")
        options = Options(
            max_new_tokens=settings.max_new_tokens, max_flush_units=settings.max_flush_units
        )
        limits = Limits(settings.sessions, context=settings.context)
        self.settings = settings
        self.server = Server.load(checkpoint, options, limits, recogniser=settings.recogniser)
        self.server.worker.start()
        memory.settle()

    def __serve_build_asgi_app__(self) -> Starlette:
        keys = read_keys(self.settings.key_file) if self.settings.key_file else ()
        return create_app(self.server, keys, tuple(filter(None, self.settings.origins.split(","))))

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if not self.server.worker.thread.is_alive():
            raise RuntimeError("the model's thread has ended")


def build(settings: Settings) -> serve.Application:
    """The application for `serve run`. Raises ValueError, before any replica, for bad settings."""
    if settings.key_file:
        read_keys(settings.key_file)
    describe(embedded.or_embedded(settings.checkpoint, "checkpoint=CKPT"), decoder=True)
    deployment = serve.deployment(
        Replica,
        name="omni2",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.sessions + SPARE_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        ray_actor_options={
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            "resources": settings.resources,
        },
    )
    return deployment.bind(settings)

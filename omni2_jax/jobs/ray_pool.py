"""Workers of a job on a Ray cluster: actors with one worker each.

Ray places the actors and says when one has died; its payload then goes to the next idle one. The
results come back to this process.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from omni2_jax.files import first_line
from omni2_jax.jobs.pools import Make, Pool, Refused, Result, Work, call, stopped

MAX_DEATHS = 5  # of workers with the same payload: perhaps it is what kills them


@contextlib.contextmanager
def ray_pool(
    make: Make, address: str, workers: int | None, cpus: float, gpus: float
) -> Iterator[Pool]:
    """Actors that reserve `cpus` and `gpus` each. workers: how many; None: as many as fit.

    Raises ValueError if there is no cluster at `address`.
    """
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {first_line(error)}") from None
    try:
        size = workers or fitting(cpus, gpus)
        actors = Actors(make, size, cpus, gpus)
        with stopped(ThreadPoolExecutor(size)) as executor, contextlib.closing(actors):
            yield Pool(lambda payload: executor.submit(actors.call, payload), size)
    finally:
        ray.shutdown()


def fitting(cpus: float, gpus: float) -> int:
    """How many workers the cluster holds now, at least 1."""
    resources = ray.cluster_resources()
    counts = [
        int(resources.get(name, 0) // need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need
    ]
    return max(1, min(counts, default=1))


class Worker:
    """An actor: a process of its own, somewhere in the cluster."""

    def begin(self, make: Make) -> None:
        """Make the worker."""
        self.work: Work = make()

    def call(self, payload: Any) -> Result | Refused:
        """The result of a payload, or its refusal."""
        return call(self.work, payload)


class Actors:
    """Actors that are idle, and a thread for each one that is being started."""

    def __init__(self, make: Make, size: int, cpus: float, gpus: float):
        self.make = ray.put(make)
        self.actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
        # In place of an actor, an exception for whoever asks for one.
        self.idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(size):
            self.start()

    def start(self) -> None:
        """Start an actor, which becomes idle when Ray has found a place for it."""
        threading.Thread(target=self.begin, daemon=True).start()

    def begin(self) -> None:
        """Start actors until one is ready."""
        while True:
            actor = self.actor_class.remote()
            try:
                ray.get(actor.begin.remote(self.make))
                return self.idle.put(actor)
            except RayTaskError as error:
                return self.idle.put(error.cause)
            except RayError:
                continue

    def call(self, payload: Any) -> Result | Refused:
        """The result of a payload from the next actor that is idle.

        Raises what the function raises, or RuntimeError if several actors die of the payload.
        """
        death = ""
        for _ in range(MAX_DEATHS):
            actor = self.idle.get()
            if isinstance(actor, BaseException):
                self.idle.put(actor)
                raise actor
            try:
                result: Any = ray.get(actor.call.remote(payload))
            except RayTaskError as error:
                self.idle.put(actor)
                raise error.cause from None
            except RayError as error:
                death = first_line(error)
                self.start()
                continue
            self.idle.put(actor)
            return result
        raise RuntimeError(f"{MAX_DEATHS} Ray workers died of the same item: {death}")

    def close(self) -> None:
        """Let nobody wait for an actor any longer."""
        self.idle.put(RuntimeError("the Ray workers were stopped"))

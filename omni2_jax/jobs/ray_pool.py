"""Workers of a job on a Ray cluster: actors with one worker each.

Ray places the actors and says when one has died; its payload then goes to the next idle one. The
results come back to this process.
"""

import contextlib
import io
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
import rich.text
from ray.exceptions import RayError, RayTaskError

from omni2_jax.console import say
from omni2_jax.files import first_line
from omni2_jax.jobs.pools import Make, Pool, Refused, Result, Work, call, stopped

MAX_DEATHS = 5  # of workers in turn, for the same reason: it is not the nodes then
CONNECT_SECONDS = 10
WAIT_SECONDS = 0.5  # between two looks at whether the job has ended


@contextlib.contextmanager
def ray_pool(
    make: Make, address: str, workers: int | None, cpus: float, gpus: float
) -> Iterator[Pool]:
    """Actors that reserve `cpus` and `gpus` each. workers: how many; None: as many as fit.

    Raises ValueError if there is no cluster at `address`.
    """
    connect(address)
    try:
        size = fitting(cpus, gpus)
        if not size:
            say(f"no node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs: waiting for one")
        size = workers or max(1, size)
        actors = Actors(make, size, cpus, gpus)
        with (
            contextlib.redirect_stdout(cast(Any, Notes())),
            stopped(ThreadPoolExecutor(size)) as executor,
            contextlib.closing(actors),
        ):
            yield Pool(lambda payload: executor.submit(actors.call, payload), size)
    finally:
        ray.shutdown()


def connect(address: str) -> None:
    """Connect to a cluster. Raises ValueError if there is none."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:
            # Ray itself tries for two minutes, and then ends the process.
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {first_line(error)}") from None


def fitting(cpus: float, gpus: float) -> int:
    """How many workers the nodes of the cluster hold."""
    needs = [(name, need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    return sum(
        min((int(node["Resources"].get(name, 0) // need) for name, need in needs), default=1)
        for node in ray.nodes()
        if node["Alive"]
    )


class Notes(io.TextIOBase):
    """A stdout for Ray, which prints pages there when a node dies: the first line is a note."""

    def write(self, text: str) -> int:
        if text.strip():
            say(rich.text.Text.from_ansi(text.strip().splitlines()[0]).plain)
        return len(text)


class Worker:
    """An actor: a process of its own, somewhere in the cluster."""

    def begin(self, make: Make) -> None:
        """Make the worker."""
        self.work: Work = make()

    def call(self, payload: Any) -> Result | Refused:
        """The result of a payload, or its refusal."""
        return call(self.work, payload)


class Actors:
    """Actors that are idle, and threads that wait for those that are being started."""

    def __init__(self, make: Make, size: int, cpus: float, gpus: float):
        self.make = ray.put(make)
        # Each worker's JAX would use all CPUs and all GPUs of the node.
        environment = {"NPROC": str(max(1, int(cpus)))}
        if not gpus:
            environment["JAX_PLATFORMS"] = "cpu"
        self.actor_class = ray.remote(
            num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": environment}
        )(Worker)
        # In place of an actor, an exception for whoever asks for one.
        self.idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.starters = ThreadPoolExecutor(size)
        for _ in range(size):
            self.starters.submit(self.start)

    def start(self) -> None:
        """Start an actor, and another one if it dies, until one is ready."""
        death = ""
        for _ in range(MAX_DEATHS):
            actor = self.actor_class.remote()
            begun = actor.begin.remote(self.make)
            # Ray does not survive a shutdown while a thread waits in `ray.get`.
            while not self.closed.is_set() and not ray.wait([begun], timeout=WAIT_SECONDS)[0]:
                pass
            if self.closed.is_set():
                return
            try:
                ray.get(begun)
                return self.idle.put(actor)
            except RayTaskError as error:
                return self.idle.put(error.cause)
            except RayError as error:
                death = first_line(error)
        self.idle.put(RuntimeError(f"{MAX_DEATHS} Ray workers died when they started: {death}"))

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
                self.starters.submit(self.start)
                continue
            self.idle.put(actor)
            return result
        raise RuntimeError(f"{MAX_DEATHS} Ray workers died of the same item: {death}")

    def close(self) -> None:
        """Start no more actors; calls that wait for one return."""
        self.closed.set()
        self.starters.shutdown(cancel_futures=True)
        self.idle.put(RuntimeError("the Ray workers were stopped"))

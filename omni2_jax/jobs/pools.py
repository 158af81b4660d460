"""Workers of a job on this machine: threads of this process, or processes.

Each pool is a context that gives a `Pool`. A worker that refuses its payload returns the `Refused`
in place of a `Result`.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):  # noqa: N818 - an outcome of an item, not an error of the program
    """An item that cannot be used; the job goes on. reason: in a few words, for counting."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class Result:
    """What came of an item.

    value: JSON-able. files: contents of files that belong to it, by their names in the job's
    directory; they are written before the item is noted as finished.
    """

    value: Any
    files: Mapping[str, bytes] = field(default_factory=dict)


Work = Callable[[Any], Result]
Make = Callable[[], Work]


@dataclass(frozen=True)
class Pool:
    """Workers. submit: starts the work on a payload. size: how many workers there are."""

    submit: Callable[[Any], "Future[Result | Refused]"]
    size: int


@contextlib.contextmanager
def threads(make: Make, workers: int) -> Iterator[Pool]:
    """Threads that share one worker. `make` is called at once."""
    work = make()
    with stopped(ThreadPoolExecutor(workers)) as executor:
        yield Pool(lambda payload: executor.submit(call, work, payload), workers)


@contextlib.contextmanager
def processes(make: Make, workers: int) -> Iterator[Pool]:
    """Processes with a worker each, which is made when the process gets its first payload.

    Raises RuntimeError if a process dies.
    """
    executor = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork does not survive the threads of JAX
        initializer=signal.signal,  # an interrupt is for the process that started them
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    with stopped(executor):
        try:
            yield Pool(lambda payload: executor.submit(call_in_process, make, payload), workers)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died, perhaps for lack of memory; the same command goes on where "
                "it stopped, with as many processes as --workers says"
            ) from None


@contextlib.contextmanager
def stopped(executor: Executor) -> Iterator[Executor]:
    """An executor that drops what it has not begun when the block ends."""
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def call(work: Work, payload: Any) -> Result | Refused:
    """The result of a payload, or its refusal."""
    try:
        return work(payload)
    except Refused as refusal:
        return refusal


worker_of_process: list[Work] = []


def call_in_process(make: Make, payload: Any) -> Result | Refused:
    """`call` with the worker of this process."""
    if not worker_of_process:
        worker_of_process.append(make())
    return call(worker_of_process[0], payload)

"""The loop of a job: items go to workers, and what comes back goes to the journal."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni2_jax import files
from omni2_jax.console import say
from omni2_jax.jobs.bar import Bar
from omni2_jax.jobs.journal import Journal, Outcome
from omni2_jax.jobs.pools import Pool, Refused, Result

FILE_WRITERS = 16  # files of results that are written at the same time


@dataclass(frozen=True)
class Item:
    """One piece of work.

    key: names it in messages; no two items have the same. payload: what the function gets; it can
    be pickled. digest: a text that changes with the payload; None makes it of the payload, which is
    JSON-able then. share: how much of all items there is up to this one, 0 to 1, for the progress
    bar where their number is not known.
    """

    key: str
    payload: Any
    digest: str | None = None
    share: float | None = None


@dataclass(frozen=True)
class Task:
    """An item that has no outcome yet, with its place among all items and its digest."""

    number: int
    item: Item
    digest: str

    def outcome(self, result: Result | Refused) -> Outcome:
        """What the journal keeps of a result."""
        if isinstance(result, Refused):
            place = (self.number, self.item.key, self.digest)
            return Outcome(*place, reason=result.reason, message=result.message)
        return Outcome(
            self.number, self.item.key, self.digest, result.value, tuple(sorted(result.files))
        )


def run(tasks: Iterator[Task], pool: Pool, journal: Journal, bar: Bar) -> None:
    """Process all tasks. See `Job.run` for what happens when the function raises."""
    running: dict[Future[Result | Refused], Task] = {}
    failures: list[tuple[float, BaseException]] = []
    bar.begin()
    with stop_signals() as stopping, ThreadPoolExecutor(FILE_WRITERS) as writers:
        while True:
            while not (failures or stopping.is_set()) and len(running) < 2 * pool.size:
                try:
                    task = next(tasks, None)
                except Exception as error:  # the source of the items is damaged from here on
                    failures.append((math.inf, error))
                    break
                if task is None:
                    break
                running[pool.submit(task.item.payload)] = task
            if not running:
                break
            if stopping.is_set() or any(number < math.inf for number, _ in failures):
                running = {future: task for future, task in running.items() if not future.cancel()}
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            finished = [(running.pop(future), future) for future in done]
            failures += save(finished, journal, bar, writers)
        if stopping.is_set():
            raise KeyboardInterrupt
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


def save(
    finished: list[tuple[Task, Future[Result | Refused]]],
    journal: Journal,
    bar: Bar,
    writers: ThreadPoolExecutor,
) -> list[tuple[float, BaseException]]:
    """Note finished tasks in the journal, their files first; return those that failed."""
    failures, outcomes, shares = [], [], []
    contents: dict[Path, bytes] = {}
    for task, future in finished:
        if error := future.exception():
            error.add_note(f"item {task.number}: {task.item.key}")
            failures.append((task.number, error))
            continue
        result = future.result()
        outcomes.append(task.outcome(result))
        shares.append(task.item.share)
        if isinstance(result, Result):
            contents |= {journal.directory / name: data for name, data in result.files.items()}
    list(writers.map(write_file, contents, contents.values()))
    if outcomes:
        journal.add(outcomes)
        refused = sum(outcome.reason is not None for outcome in outcomes)
        share = max((share for share in shares if share is not None), default=None)
        bar.update(len(outcomes), refused, share)
    return failures


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole. Raises ValueError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that is set by the first interrupt, or by the signal that ends a batch job.

    The second one raises KeyboardInterrupt, as usual.
    """
    stopping = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        say("finishing the items that are being processed; once more to drop them")

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

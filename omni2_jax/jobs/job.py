"""A job: its settings, and which of its items must still be processed."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni2_jax.console import say
from omni2_jax.jobs import loop, pools
from omni2_jax.jobs.bar import Bar
from omni2_jax.jobs.journal import Journal, shards_in
from omni2_jax.jobs.loop import Item, Task
from omni2_jax.jobs.results import Results
from omni2_jax.jobs.where import WHOLE, Shard, Where

HERE = Where()


@dataclass(frozen=True)
class Job:
    """Maps items through a function. The package's docstring has an example.

    name: what the items are called, in the plural: "dialogues". directory: for the journal and the
    files of results. settings: whatever the results depend on, JSON-able, by name; a job goes on
    with the same settings only. make: returns the function; it is called once in each process, and
    can be pickled if the job runs in processes or on Ray. The function returns a `Result` for a
    payload, or raises `Refused`; any other exception ends the job. Retries are up to it.

    workers: items that are processed at the same time, unless the user says otherwise. kind: what
    processes them on one machine; threads call one function at the same time. cpus: what Ray
    reserves for each worker.
    """

    name: str
    directory: Path
    settings: Mapping[str, Any]
    make: pools.Make
    workers: int = 8
    kind: Literal["threads", "processes"] = "threads"
    cpus: float = 1

    def run(
        self, items: Iterable[Item], where: Where = HERE, total: int | None = None
    ) -> Results | None:
        """Process the items that have no outcome yet, and return the outcomes of all.

        Returns None after one shard of several. Without a shard, in a directory that holds the
        journals of several, it processes nothing and returns the outcomes of all shards.
        total: the number of items, for the progress bar.

        When the function raises, the items that are being processed are finished and kept; then the
        exception is raised, of several that of the first item. An interrupt does the same.
        Raises ValueError, one line, if the journal was begun with other settings or items, is in
        use, is damaged or cannot be written; if two items have the same key; if shards are missing.
        """
        shard, items = where.shard or WHOLE, Counted(items)
        counts = {other.count for other in shards_in(self.directory)}
        if len(counts) == 1 and counts != {1} and shard == WHOLE:
            return self.merge(items, counts.pop())
        if counts - {shard.count}:
            raise ValueError(
                f"{self.directory} was begun with {' and '.join(map(str, sorted(counts)))} shards, "
                f"not {shard.count}; go on with the same --shard I/N, or give a new directory"
            )
        with self.journal(shard) as journal:
            self.process(items, where, total, journal)
        if shard == WHOLE:
            return Results(self.name, self.directory, [journal], items.count)
        say(
            f"shard {shard} of the {self.name} is complete; when all shards are, run the same "
            "command without --shard"
        )
        return None

    def process(
        self, items: Iterable[Item], where: Where, total: int | None, journal: Journal
    ) -> None:
        """Process what the journal lacks of a shard."""
        tasks = lacking(items, [journal], journal.shard.holds)
        first = next(tasks, None)
        if first is None:
            return  # and load no model
        refused = sum(place.reason is not None for place in journal.places.values())
        with (
            Bar(self.name, journal.shard, total, len(journal.places), refused) as bar,
            self.pool(where) as pool,
        ):
            loop.run(itertools.chain([first], tasks), pool, journal, bar)

    def pool(self, where: Where) -> AbstractContextManager[pools.Pool]:
        """The workers."""
        if where.ray is not None:
            from omni2_jax.jobs.ray_pool import ray_pool

            return ray_pool(self.make, where.ray, where.workers, self.cpus, where.ray_gpus)
        workers = where.workers or self.workers
        if self.kind == "threads":
            return pools.threads(self.make, workers)
        return pools.processes(self.make, workers)

    def merge(self, items: "Counted", count: int) -> Results:
        """The outcomes of `count` shards. Raises ValueError naming the shards that lack some."""
        journals = [self.journal(Shard(index, count)) for index in range(count)]
        with contextlib.ExitStack() as stack:
            for shard in shards_in(self.directory):
                stack.enter_context(journals[shard.index])
            missing = [task.number for task in lacking(items, journals)]
        if missing:
            shards = sorted({Shard(number % count, count) for number in missing})
            raise ValueError(
                f"{len(missing):,} {self.name} are missing in {self.directory}; first run the "
                f"command with --shard {', '.join(map(str, shards))}"
            )
        return Results(self.name, self.directory, journals, items.count)

    def journal(self, shard: Shard) -> Journal:
        """The journal of a shard."""
        return Journal(self.directory, shard, {"job": self.name, **self.settings})


class Counted:
    """Items, and how many there were so far."""

    def __init__(self, items: Iterable[Item]):
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[Item]:
        for item in self.items:
            self.count += 1
            yield item


def lacking(
    items: Iterable[Item],
    journals: list[Journal],
    ours: Callable[[int], bool] = lambda number: True,
) -> Iterator[Task]:
    """The items without an outcome. ours: whether the item of a number is to be looked at.

    Raises ValueError if two items have the same key, or one differs from the item of its outcome.
    """
    numbers: dict[str, int] = {}
    for number, item in enumerate(items):
        other = numbers.setdefault(item.key, number)
        if other != number:
            raise ValueError(f"the items {other} and {number} have the same key, {item.key!r}")
        if not ours(number):
            continue
        task = Task(number, item, item.digest or digest(item.payload))
        journal = journals[number % len(journals)]
        place = journal.places.get(number)
        if place is None:
            yield task
        elif (place.key, place.digest) != (item.key, task.digest):
            change = f"is {item.key!r}" if place.key != item.key else "has other content"
            raise ValueError(
                f"{journal.path} was begun with other items: number {number}, {place.key!r}, "
                f"{change} now; give a new directory"
            )


def digest(payload: Any) -> str:
    """A text that changes with a JSON-able payload."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:16]

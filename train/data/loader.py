"""Batches in a fixed order: which rows a step sees follows from the seed and the step alone, for any number of processes.

Examples are shuffled anew every epoch and gathered in buckets, so that every batch has one of a few static shapes; a bucket that is
full is a batch. Grain reads ahead in threads; where a run stands in its data is the number of the next batch, and nothing else.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from omni2_jax.files import first_line
from omni2_jax.train.data.dataset import RecordError
from omni2_jax.train.examples import Examples, Item, Row
from omni2_jax.train.settings import Bucket, TrainConfig

EMPTY_ROW = -1  # a row that no example fills, in the last batches


@dataclass(frozen=True)
class Batch:
    """Which items a step sees."""

    bucket: Bucket
    rows: np.ndarray  # [batch] into the list of items


@dataclass
class Catalogue:
    """What a data set gives: items by bucket, and what was left out and why."""

    items: list[Item] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)  # of each item
    skipped: dict[str, str] = field(default_factory=dict)  # reason by dialogue

    def reasons(self, most: int) -> list[str]:
        """The most common reasons, each with one dialogue that it holds for; what differs between these stands in brackets."""
        alike = defaultdict(list)
        for name, reason in self.skipped.items():
            alike[reason.partition(" (")[0]].append(f"{name}: {reason}")
        return [
            f"{len(some)} x {some[0]}"
            for some in sorted(alike.values(), key=len, reverse=True)[:most]
        ]


def catalogue(
    examples: Examples, dialogues: Iterable[int], buckets: Sequence[Bucket], strict: bool
) -> Catalogue:
    """Measure every example. Raises ValueError if there is none, or, when strict, for the first that cannot be used."""
    found = Catalogue()
    for index in dialogues:
        try:
            items = examples.items(index)
            places = [place(item.size, buckets) for item in items]
        except ValueError as error:
            if strict:
                raise ValueError(f"{examples.data.path}: dialogue {index}: {error}") from None
            found.skipped[f"dialogue {index}"] = str(error)
            continue
        found.items += items
        found.buckets += places
    if not found.items:
        why = "; ".join(found.reasons(3))
        raise ValueError(
            f"{examples.data.path} has nothing to train stage {examples.train.stage} on: {why}"
        )
    return found


def place(size: Bucket, buckets: Sequence[Bucket]) -> int:
    """The first bucket that holds an example of this size."""
    for i, bucket in enumerate(buckets):
        if (
            size.clips <= bucket.clips
            and size.positions <= bucket.positions
            and size.tokens <= bucket.tokens
        ):
            return i
    raise ValueError(
        f"too long for every bucket ({size.clips} clips, {size.positions} positions, {size.tokens} tokens)"
    )


def schedule(found: Catalogue, train: TrainConfig) -> list[Batch]:
    """All batches of a run in order. In the last ones rows may be EMPTY."""
    epochs, waiting, batches, epoch = train.epochs, defaultdict(list), [], 0
    while train.steps or epoch < epochs:
        order = np.random.default_rng((train.seed, epoch)).permutation(len(found.items))
        if not train.steps and epochs - epoch < 1:
            order = order[: math.ceil(len(order) * (epochs - epoch))]
        for item in order:
            row = waiting[found.buckets[item]]
            row.append(item)
            if len(row) == train.batch:
                batches.append(Batch(train.buckets[found.buckets[item]], np.array(row)))
                row.clear()
                if len(batches) == train.steps:
                    return batches
        epoch += 1
    for bucket, rows in sorted(waiting.items()):
        if rows:
            batches.append(
                Batch(
                    train.buckets[bucket], np.array(rows + [EMPTY_ROW] * (train.batch - len(rows)))
                )
            )
    return batches


def filled(found: Catalogue, batches: Sequence[Batch]) -> float:
    """The share of the positions and tokens computed that hold something; the rest is padding."""
    extent = lambda bucket: bucket.positions + max(bucket.clips, 1) * bucket.tokens  # noqa: E731
    used = sum(
        extent(found.items[row].size) for batch in batches for row in batch.rows if row != EMPTY_ROW
    )
    return used / sum(extent(batch.bucket) * len(batch.rows) for batch in batches)


class Source:
    """For grain: item i is this process's share of batch i, {name: [microbatches, rows, ...]}."""

    def __init__(self, examples: Examples, found: Catalogue, batches: Sequence[Batch], rows: slice):
        self.examples, self.found, self.batches, self.rows = examples, found, batches, rows
        self.damaged: dict[str, str] = {}  # records met so far that could not be read, and why
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Row:
        batch = self.batches[index]
        rows = batch.rows.reshape(self.examples.train.microbatches, -1)[:, self.rows]
        made = [self.row(row, batch.bucket) for row in rows.ravel()]
        return {
            name: np.stack([row[name] for row in made]).reshape(*rows.shape, *made[0][name].shape)
            for name in made[0]
        }

    def row(self, number: int, bucket: Bucket) -> Row:
        """An example's arrays; those of nothing for a damaged one, so that what the other rows hold does not change."""
        if number == EMPTY_ROW:
            return self.examples.empty(bucket)
        item = self.found.items[number]
        try:
            return self.examples.row(item, bucket)
        except RecordError as error:
            if self.examples.train.strict:
                raise
            with self.lock:
                self.damaged[f"dialogue {item.dialogue}"] = str(error)
            return self.examples.empty(bucket)


def local_rows(sharding: NamedSharding, count: int) -> slice:
    """Which of `count` rows the devices of this process hold."""
    parts = [
        index[0].indices(count)
        for index in sharding.addressable_devices_indices_map((count,)).values()
    ]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


class Loader:
    """Batches on the devices, from step `start` on.

    sharding: of a microbatch's rows. Iterating gives (batch on the devices, the same on the host).
    """

    def __init__(
        self,
        examples: Examples,
        found: Catalogue,
        batches: Sequence[Batch],
        sharding: NamedSharding,
    ):
        train = examples.train
        self.size = train.batch // train.microbatches
        cut = math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding))
        if self.size % cut:
            raise ValueError(
                f"{self.size} rows (batch {train.batch} in {train.microbatches} microbatches) cannot be cut over the {cut} devices "
                f"of the mesh's replica and fsdp axes; a batch of {cut * train.microbatches * -(-self.size // cut)} can"
            )
        self.rows = local_rows(sharding, self.size)
        self.sharding = NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec)
        )
        self.source = Source(examples, found, batches, self.rows)
        self.options = grain.ReadOptions(
            num_threads=train.workers, prefetch_buffer_size=2 * train.workers
        )

    def start(self, step: int) -> Iterator[tuple[dict[str, jax.Array], Row]]:
        iterator = iter(grain.MapDataset.source(self.source).to_iter_dataset(self.options))
        iterator.set_state({"next_index": step})
        try:
            for batch in iterator:
                yield {name: self.place(value) for name, value in batch.items()}, batch
        except RecordError as error:  # Grain adds to the message what it did to the traceback
            raise RecordError(first_line(error)) from None

    def place(self, value: np.ndarray) -> jax.Array:
        """This process's rows as part of the array of all."""

        def rows_of(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(self.size)
            return value[:, start - self.rows.start : stop - self.rows.start]

        return jax.make_array_from_callback(
            (value.shape[0], self.size, *value.shape[2:]), self.sharding, rows_of
        )


def axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes over which the first dimension is cut."""
    axes = sharding.spec[0] if sharding.spec else None
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

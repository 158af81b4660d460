"""Batches in a fixed order: the rows of a step follow from the seed and the step alone.

Neither the number of processes nor that of devices changes them. Examples are shuffled anew every
epoch and gathered by bucket, so that every batch has one of a few static shapes; a bucket that is
full becomes a batch. Grain reads ahead in threads. The position of a run in its data is the number
of the next batch, and nothing else.
"""

import itertools
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omni2_jax.files import first_line
from omni2_jax.sharding import check_rows
from omni2_jax.train.data.dataset import RecordError
from omni2_jax.train.examples import Examples, Item, Row
from omni2_jax.train.settings import Bucket, TrainConfig

EMPTY_ROW = -1  # stands for an example in rows of the last batches that have none


# ---- which rows a step has ----


@dataclass
class Catalogue:
    """The examples of a data set, and the dialogues that were left out.

    buckets: for each item the index of its bucket. skipped: reason by dialogue.
    """

    items: list[Item] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def reasons(self, most: int) -> list[str]:
        """The most common reasons, each with its number of dialogues and the first of them.

        Details in brackets ("too long (2 segments)") do not make two reasons different.
        """
        by_reason = defaultdict(list)
        for name, reason in self.skipped.items():
            by_reason[reason.partition(" (")[0]].append(f"{name}: {reason}")
        common = sorted(by_reason.values(), key=len, reverse=True)[:most]
        return [f"{len(dialogues)} x {dialogues[0]}" for dialogues in common]


@dataclass(frozen=True)
class Batch:
    """The examples of a step. rows: [batch], indices of items in the catalogue, or EMPTY_ROW."""

    bucket: Bucket
    rows: np.ndarray


def catalogue(
    examples: Examples, dialogues: Iterable[int], buckets: Sequence[Bucket], strict: bool
) -> Catalogue:
    """Measure the examples of all dialogues.

    Raises ValueError naming the data set if there is no example, or, when strict, for the first
    dialogue that cannot be used.
    """
    result = Catalogue()
    for index in dialogues:
        try:
            items = examples.items(index)
            item_buckets = [bucket_index(item.size, buckets) for item in items]
        except ValueError as error:
            if strict:
                raise ValueError(f"{examples.data.path}: {examples.name(index)}: {error}") from None
            result.skipped[examples.name(index)] = str(error)
            continue
        result.items += items
        result.buckets += item_buckets
    if not result.items:
        raise ValueError(
            f"{examples.data.path} has nothing to train stage {examples.train.stage} on: "
            + "; ".join(result.reasons(3))
        )
    return result


def bucket_index(size: Bucket, buckets: Sequence[Bucket]) -> int:
    """The first bucket that holds an example of this size. Raises ValueError if none does."""
    for index, bucket in enumerate(buckets):
        if (
            size.segments <= bucket.segments
            and size.positions <= bucket.positions
            and size.tokens <= bucket.tokens
        ):
            return index
    raise ValueError(
        f"too long for every bucket ({size.segments} segments, {size.positions} positions, "
        f"{size.tokens} tokens)"
    )


def schedule(catalogue: Catalogue, train: TrainConfig) -> list[Batch]:
    """All batches of a run, in order. The last batch of a bucket may have EMPTY_ROW in it."""
    waiting: dict[int, list[int]] = defaultdict(list)  # by bucket
    batches: list[Batch] = []
    for item in example_order(len(catalogue.items), train):
        bucket = catalogue.buckets[item]
        waiting[bucket].append(item)
        if len(waiting[bucket]) == train.batch:
            batches.append(Batch(train.buckets[bucket], np.array(waiting.pop(bucket))))
            if len(batches) == train.steps:
                return batches
    for bucket, rows in sorted(waiting.items()):
        rows += [EMPTY_ROW] * (train.batch - len(rows))
        batches.append(Batch(train.buckets[bucket], np.array(rows)))
    return batches


def example_order(count: int, train: TrainConfig) -> Iterator[int]:
    """Indices of `count` examples, shuffled by (seed, epoch) for each epoch.

    Endless if `train.steps` is set; otherwise for `train.epochs`, which may be a fraction.
    """
    for epoch in itertools.count():
        remaining = math.inf if train.steps else (train.epochs or 0) - epoch
        if remaining <= 0:
            return
        order = np.random.default_rng((train.seed, epoch)).permutation(count)
        yield from order[: math.ceil(count * min(remaining, 1))].tolist()


def filled(catalogue: Catalogue, batches: Sequence[Batch]) -> float:
    """The share of the computed positions and tokens that is not padding."""
    used = sum(
        catalogue.items[row].size.size
        for batch in batches
        for row in batch.rows
        if row != EMPTY_ROW
    )
    return used / sum(batch.bucket.size * len(batch.rows) for batch in batches)


# ---- their arrays ----


class Source:
    """For Grain: item i holds the rows of batch i for this process.

    An item is {name: array [microbatches, rows, ...]}. rows: the part of a microbatch. `damaged`
    collects the reasons why items could not be read, by the `dialogue` of the item.
    """

    def __init__(
        self, examples: Examples, catalogue: Catalogue, batches: Sequence[Batch], rows: slice
    ):
        self.examples, self.catalogue, self.batches = examples, catalogue, batches
        self.rows = rows
        self.damaged: dict[int, str] = {}
        self.told = 0  # how many of them `new_damage` has returned
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Row:
        batch = self.batches[index]
        numbers = batch.rows.reshape(self.examples.train.microbatches, -1)[:, self.rows]
        rows = [self.row(number, batch.bucket) for number in numbers.ravel()]
        return {
            name: np.stack([row[name] for row in rows]).reshape(*numbers.shape, *value.shape)
            for name, value in rows[0].items()
        }

    def row(self, number: int, bucket: Bucket) -> Row:
        """The arrays of an example; for EMPTY_ROW and damaged records those of an empty row.

        An empty row keeps the content of all other rows as it is. Raises RecordError for a damaged
        record if the run is strict.
        """
        if number == EMPTY_ROW:
            return self.examples.empty(bucket)
        item = self.catalogue.items[number]
        try:
            return self.examples.row(item, bucket)
        except RecordError as error:
            if self.examples.train.strict:
                raise
            with self.lock:
                self.damaged[item.dialogue] = str(error)
            return self.examples.empty(bucket)

    def new_damage(self) -> list[str]:
        """The reasons in `damaged` that no earlier call has returned."""
        with self.lock:
            reasons = list(self.damaged.values())[self.told :]
            self.told += len(reasons)
        return reasons


def local_rows(sharding: NamedSharding, count: int) -> slice:
    """The part of `count` rows that the devices of this process hold."""
    indices = sharding.addressable_devices_indices_map((count,)).values()
    parts = [index[0].indices(count) for index in indices if index is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


class Loader:
    """Batches on the devices, from any step on.

    sharding: of the rows [B] of a microbatch. Raises ValueError if the devices do not divide them.
    """

    def __init__(
        self,
        examples: Examples,
        catalogue: Catalogue,
        batches: Sequence[Batch],
        sharding: NamedSharding,
    ):
        train, mesh = examples.train, sharding.mesh
        self.size = train.batch // train.microbatches  # rows of a microbatch
        check_rows(mesh, train.batch, train.microbatches)
        self.rows = local_rows(sharding, self.size)
        self.sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        self.source = Source(examples, catalogue, batches, self.rows)
        self.options = grain.ReadOptions(
            num_threads=train.workers, prefetch_buffer_size=2 * train.workers
        )

    def start(self, step: int) -> Iterator[tuple[dict[str, jax.Array], Row]]:
        """(batch on the devices, the same of this process on the host) of `step` and those after.

        Raises RecordError at a damaged record if the run is strict.
        """
        iterator = iter(grain.MapDataset.source(self.source).to_iter_dataset(self.options))
        iterator.set_state({"next_index": step})
        try:
            for batch in iterator:
                yield {name: self.to_devices(value) for name, value in batch.items()}, batch
        except RecordError as error:  # Grain appends its own explanation to the message
            raise RecordError(first_line(error)) from None

    def to_devices(self, value: np.ndarray) -> jax.Array:
        """Rows [microbatches, rows, ...] of this process as a part of the array of all."""

        def rows_of(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(self.size)
            return value[:, start - self.rows.start : stop - self.rows.start]

        shape = (value.shape[0], self.size, *value.shape[2:])
        return jax.make_array_from_callback(shape, self.sharding, rows_of)

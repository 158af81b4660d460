"""Where a job runs: how many workers, on this machine or a Ray cluster, and which share of it."""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Shard(NamedTuple):
    """The items number `index`, `index` + `count`, `index` + 2 `count` and so on; both from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, number: int) -> bool:
        """Whether the item of this number is one of the shard's."""
        return number % self.count == self.index


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class Where:
    """Where a job runs.

    workers: items that are processed at the same time; None leaves it to the job. ray: None for
    this machine alone, or the address of a Ray cluster; "auto" is the one that this machine is part
    of; ray_gpus: the GPUs that it reserves for each worker. shard: the share of the items that this
    process works on; None is all of them. Raises ValueError for GPUs without Ray.
    """

    workers: int | None = None
    ray: str | None = None
    shard: Shard | None = None
    ray_gpus: float = 0

    def __post_init__(self) -> None:
        if self.ray_gpus and self.ray is None:
            raise ValueError("--ray-gpus is for --ray: nothing else reserves GPUs")


def parse_shard(text: str) -> Shard:
    """The shard of "I/N", with 0 <= I < N. Raises ValueError for another text."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else WHOLE
    if match is None or not shard.index < shard.count:
        raise ValueError(f"{text!r} is no shard; expected I/N with I from 0 to N - 1, as 0/4")
    return shard

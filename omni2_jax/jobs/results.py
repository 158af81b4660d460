"""The results of a job, in the order of its items."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omni2_jax.jobs.journal import Journal, Outcome, read_outcome


class Results:
    """All outcomes of a job in the order of its items, read one at a time from its journals.

    name: what the items are called in the summary. Files of results are in `directory`. count: of
    the items; an earlier run may have had more. refused: the number of refused items by reason.
    """

    def __init__(self, name: str, directory: Path, journals: Sequence[Journal], count: int):
        self.name, self.directory = name, directory
        self.journals = [journal for journal in journals if journal.places]  # others have no file
        places = [
            (number, place, source)
            for source, journal in enumerate(self.journals)
            for number, place in journal.places.items()
            if number < count
        ]
        self.places = sorted(places)
        self.refused = Counter(place.reason for _, place, _ in places if place.reason is not None)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Outcome]:
        return self.read(range(len(self)))

    def accepted(self) -> Iterator[Outcome]:
        """The outcomes of items that were not refused."""
        return self.read(i for i, (_, place, _) in enumerate(self.places) if place.reason is None)

    def read(self, indices: Iterable[int]) -> Iterator[Outcome]:
        """The outcomes at some places of the order."""
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(open(one.local, "rb")) for one in self.journals]
            for index in indices:
                _, place, source = self.places[index]
                yield read_outcome(sources[source], place)

    def summary(self) -> str:
        """One line: how many there are, and each reason of refusals with its first message."""
        refused = self.refused.total()
        text = f"{len(self) - refused:,} {self.name}"
        if not refused:
            return text
        firsts: dict[str, int] = {}  # by reason
        for index, (_, place, _) in enumerate(self.places):
            if place.reason is not None:
                firsts.setdefault(place.reason, index)
        reasons = [
            f"{self.refused[reason]:,} x {reason} (first: {first.key}: {first.message})"
            for reason, first in zip(firsts, self.read(firsts.values()), strict=True)
        ]
        return f"{text}; {refused:,} refused: {'; '.join(reasons)}"

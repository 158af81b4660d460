"""The progress bar of a job: how many items are done, how many a second, how many were refused."""

import contextlib
import time
from types import TracebackType

import rich.progress

from omni2_jax.console import console, progress_bar, say
from omni2_jax.jobs.where import Shard

LOG_SECONDS = 60  # between two lines where no bar can be shown: in the log of a batch system


class Bar(contextlib.AbstractContextManager):
    """Shows the progress of a job: `with Bar(...) as bar: bar.update(...)`.

    total: the number of all items, or None. done, refused: what an earlier process finished of this
    shard's.
    """

    def __init__(self, name: str, shard: Shard, total: int | None, done: int, refused: int):
        self.name, self.done, self.refused = name, done, refused
        self.total = None if total is None else len(range(shard.index, total, shard.count))
        self.before, self.share, self.began = done, 0.0, time.monotonic()
        self.logged = self.began
        self.progress = progress_bar(rich.progress.TaskProgressColumn())
        # Without a total, the bar shows shares, if the items have them.
        self.task = self.progress.add_task(self.text(), total=self.total, completed=done)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def begin(self) -> None:
        """Let the rate count from now: the workers are ready."""
        self.began = time.monotonic()

    def update(self, done: int, refused: int, share: float | None) -> None:
        """Add finished items, some of which were refused. share: see `Item`."""
        self.done += done
        self.refused += refused
        if self.total is not None:
            self.progress.update(self.task, completed=self.done, description=self.text())
        elif share is not None:
            self.share = max(self.share, share)
            self.progress.update(
                self.task, total=1.0, completed=self.share, description=self.text()
            )
        else:
            self.progress.update(self.task, description=self.text())
        if not console.is_terminal and time.monotonic() - self.logged > LOG_SECONDS:
            self.logged = time.monotonic()
            say(self.text())

    def text(self) -> str:
        """How far the job is, for the bar or the log."""
        of = "" if self.total is None else f" of {self.total:,}"
        rate = (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)
        refused = f", {self.refused:,} refused" if self.refused else ""
        rate_text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{self.done:,}{of} {self.name}, {rate_text}/s{refused}"

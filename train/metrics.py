"""Measurements of a run: RUN/metrics.jsonl, TensorBoard files, the live line on the terminal, and a
clock of its steps.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import rich.progress

from omni2_jax.console import console
from omni2_jax.files import atomic_write


class Metrics:
    """RUN/metrics.jsonl, one object a line: {"step": 12, "loss": 2.5, ...}; and TensorBoard.

    first: the step at which the run starts or resumes. Lines that an interrupted run wrote about
    this step and later ones are dropped. validated: whether it wrote a validation of the state
    that the run resumes from.
    """

    def __init__(self, run: Path, first: int):
        from tensorboardX import SummaryWriter

        path, kept = run / "metrics.jsonl", []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if step_of(line) < first]
            with atomic_write(path) as file:
                file.write("".join(line + "\n" for line in kept))
        last = [json.loads(line) for line in kept if step_of(line) == first - 1]
        self.validated = any("validation_loss" in values for values in last)
        self.file = open(path, "a")  # noqa: SIM115 (closed by `close`)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text in TensorBoard."""
        self.board.add_text(name, text, step)

    def sound(self, step: int, name: str, samples: np.ndarray, rate: int) -> None:
        """Show samples [N] at `rate` Hz in TensorBoard."""
        self.board.add_audio(name, samples, step, sample_rate=rate)

    def flush(self) -> None:
        """Write what TensorBoard's writer still holds."""
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; for an incomplete line a number above all steps."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 2**62


class Line:
    """The live line on the terminal: a progress bar and the last measurements.

    enabled: False shows nothing, for processes other than the first.
    """

    def __init__(self, name: str, steps: int, first: int, enabled: bool = True):
        self.progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[measured]}"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        self.task = self.progress.add_task(name, total=steps, completed=first, measured="compiling")

    def __enter__(self) -> "Line":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the measurements after so many steps."""
        parts = [f"loss {values['loss']:.4f}", f"{values['tokens_per_s']:.0f} tokens/s"]
        parts += [f"MFU {100 * values['mfu']:.1f} %"] if "mfu" in values else []
        parts += [f"data wait {100 * values['data_wait']:.1f} %"]
        self.progress.update(self.task, completed=step, measured=", ".join(parts))


class Clock:
    """Mean time of a step, and the share of it spent waiting for data, since the last `read`."""

    def __init__(self):
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def read(self) -> tuple[float, float]:
        """(seconds a step, share of it spent waiting for data) since the last call."""
        now = time.perf_counter()
        seconds, waited, steps = now - self.start, self.waited, max(self.steps, 1)
        self.start, self.waited, self.steps = now, 0.0, 0
        return seconds / steps, waited / seconds if seconds else 0.0

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time spent waiting for each is added to `waited`."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

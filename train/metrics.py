"""What a run tells about itself: RUN/metrics.jsonl, TensorBoard files, and one live line on the terminal."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import rich.console
import rich.progress

console = rich.console.Console(stderr=True)


class Metrics:
    """One JSON object a line, {"step": 12, "loss": 2.5, ...}, and the same numbers for TensorBoard.

    first: the step that a run (re)starts at; what an interrupted run wrote about this and later steps is dropped.
    """

    def __init__(self, run: Path, first: int):
        from tensorboardX import SummaryWriter

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if step_of(line) < first]
            work = self.path.with_suffix(".partial")
            work.write_text("".join(line + "\n" for line in kept))
            work.replace(self.path)
        self.file = open(self.path, "a")  # noqa: SIM115 (closed by `close`)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.board.add_text(name, text, step)

    def sound(self, step: int, name: str, samples, rate: int) -> None:
        self.board.add_audio(name, samples, step, sample_rate=rate)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def step_of(line: str) -> int:
    """Of a line of metrics.jsonl; a line that was cut off belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 2**62


class Line:
    """The live line: a bar, and behind it what the last step was like."""

    def __init__(self, name: str, steps: int, first: int):
        self.progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[now]}"),
            rich.progress.TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(name, total=steps, completed=first, now="compiling")

    def __enter__(self) -> "Line":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        parts = [f"loss {values['loss']:.4f}", f"{values['tokens_per_s']:.0f} tokens/s"]
        parts += [f"MFU {100 * values['mfu']:.1f} %"] if "mfu" in values else []
        parts += [f"data wait {100 * values['data_wait']:.1f} %"]
        self.progress.update(self.task, completed=step, now=", ".join(parts))


class Clock:
    """How the time of the steps was spent, averaged over those between two looks at it."""

    def __init__(self):
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def look(self) -> tuple[float, float]:
        """Seconds a step, and the share of them spent waiting for data, since the last look."""
        now = time.perf_counter()
        seconds, waited, steps = now - self.start, self.waited, max(self.steps, 1)
        self.start, self.waited, self.steps = now, 0.0, 0
        return seconds / steps, waited / seconds if seconds else 0.0

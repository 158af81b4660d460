"""What a run reports: the opening table, every step, damaged records, and a trace of the profiler.

    RUN/metrics.jsonl  tensorboard/  left-out.txt  profile/  bad-batch-STEP-PROCESS.npz

All processes of a run call a reporter; only the first one prints and writes. But each process saves
its rows of a bad batch, and prints the damaged records that it meets: others may not read them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import rich.table
import rich.text

from omni2_jax import devices, remote
from omni2_jax.console import console, say
from omni2_jax.train import flops
from omni2_jax.train.data.loader import Batch, filled
from omni2_jax.train.examples import Row
from omni2_jax.train.metrics import Clock, Line, Metrics
from omni2_jax.train.settings import Bucket
from omni2_jax.train.split import Split
from omni2_jax.train.stages.base import Stage
from omni2_jax.train.weights import Params, Weights


@dataclass(frozen=True)
class StepResult:
    """A dispatched step: its metrics on the devices, and this process's rows of its batch."""

    number: int
    metrics: Mapping[str, jax.Array]
    rows: Row


class Reporter:
    """Reports the steps of a run from step `first` on; a context manager around them."""

    def __init__(self, stage: Stage, out: Path, split: Split, weights: Weights, first: int):
        self.stage, self.train = stage, stage.train
        self.is_first_process = jax.process_index() == 0
        # Only the first process goes on with the file: another one would upload its old copy of it.
        self.mirror = remote.Mirror(out, ["metrics.jsonl"] if self.is_first_process else [])
        self.out = self.mirror.local
        self.split, self.weights = split, weights
        self.first, self.steps = first, len(split.batches)
        self.metrics = Metrics(self.out, first) if self.is_first_process else None
        name = f"stage {self.train.stage}"
        self.line = Line(name, self.steps, first, enabled=self.is_first_process)
        self.clock, self.tracing = Clock(), False
        self.peak_flops = self.train.peak_flops or devices.peak_flops(jax.devices()[0])

    def __enter__(self) -> "Reporter":
        self.line.__enter__()
        self.clock = Clock()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_trace()
        self.line.__exit__(*error)
        if self.metrics:
            self.metrics.close()
        self.push()

    def push(self) -> None:
        """Copy what was written so far to the run's directory, if that is in Cloud Storage."""
        if self.metrics:
            self.metrics.flush()
        self.mirror.push()

    def say(self, text: str) -> None:
        """Print a note, on the first process."""
        if self.is_first_process:
            say(text)

    def begin_step(self, number: int) -> None:
        """Start the profiler's trace before the first step of the setting `profile`."""
        first, last = self.train.profile or (0, -1)
        if self.is_first_process and first <= number <= last and not self.tracing:
            jax.profiler.start_trace(str(self.out / "profile"))
            self.tracing = True

    def end_step(self, result: StepResult | None) -> None:
        """Report a step, after waiting for it; None reports nothing.

        Raises ValueError, after saving the batch, if a metric is not finite.
        """
        if result is None:
            return
        self.clock.steps += 1
        values = {name: float(value) for name, value in jax.device_get(result.metrics).items()}
        self.check_finite(result, values)
        if result.number >= min((self.train.profile or (0, 0))[1], self.steps - 1):
            self.stop_trace()
        values |= self.speed(self.split.batches[result.number].bucket)
        values["damaged"] = self.report_damaged()
        if self.metrics:
            self.metrics.write(result.number, values)
            self.line.show(result.number + 1, values)

    def check_finite(self, result: StepResult, values: Mapping[str, float]) -> None:
        """Raise ValueError, after saving the batch, if a metric is not finite."""
        if all(np.isfinite(value) for value in values.values()):
            return
        path = self.out / f"bad-batch-{result.number}-{jax.process_index()}.npz"
        np.savez_compressed(path, **result.rows)  # pyright: ignore[reportArgumentType]
        bad = ", ".join(
            f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)
        )
        saved = self.mirror.directory / path.name
        raise ValueError(f"step {result.number}: {bad}; the batch was saved as {saved}")

    def stop_trace(self) -> None:
        """End the profiler's trace if there is one."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def speed(self, bucket: Bucket) -> dict[str, float]:
        """Time, tokens a second (with padding) and MFU since the last report."""
        seconds, waited = self.clock.read()
        tokens = self.train.batch * bucket.size
        values = {"tokens_per_s": tokens / seconds, "seconds": seconds, "data_wait": waited}
        work = flops.step(self.stage, self.split.examples.config, self.weights.shapes, bucket)
        if self.peak_flops and work:
            mesh = self.split.loader.sharding.mesh
            values["mfu"] = work / seconds / self.peak_flops / mesh.size
        return values

    def report_damaged(self) -> int:
        """How many records this process could not read so far; each is printed once."""
        source = self.split.loader.source
        for reason in source.new_damage():
            say(f"{reason}; left out")
        return len(source.damaged)

    def print_table(self, frozen: Params) -> None:
        """Print what the run is about to do; write the list of the examples that are left out."""
        if not self.is_first_process:
            return
        catalogue = self.split.catalogue
        trained = [
            leaf for path, leaf in self.weights.shapes.items() if self.stage.is_trained(path)
        ]
        mesh = self.split.loader.sharding.mesh
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        padding = 1 - filled(catalogue, self.split.batches)
        rows = {
            "parameters": f"{millions(trained)} trained, {millions(frozen.values())} frozen",
            "devices": f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {axes}",
            "examples": f"{len(catalogue.items)}, left out {len(catalogue.skipped)}",
            "left out because": "\n".join(catalogue.reasons(5)),
            "steps": f"{self.steps} of {self.train.batch} rows"
            + (f", resumed at {self.first}" if self.first else ""),
            "batches": batch_sizes(self.split.batches),
            "padding": f"{100 * padding:.0f} % of what is computed",
        }
        table = rich.table.Table(show_header=False, title=f"stage {self.train.stage}")
        for name, value in rows.items():
            if value:
                table.add_row(name, rich.text.Text(value))
        console.print(table)
        lines = [f"{name}: {reason}\n" for name, reason in catalogue.skipped.items()]
        (self.out / "left-out.txt").write_text("".join(lines))


def millions(leaves) -> str:
    """The number of parameters in some arrays."""
    return f"{sum(leaf.size for leaf in leaves) / 1e6:.1f} M"


def batch_sizes(batches: list[Batch]) -> str:
    """The number of batches of each bucket, one line each."""
    counts = Counter(batch.bucket for batch in batches)
    return "\n".join(
        f"{count} of {bucket.segments} segments, {bucket.positions} positions, "
        f"{bucket.tokens} tokens"
        for bucket, count in counts.items()
    )

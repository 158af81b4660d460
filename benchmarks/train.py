"""`python -m benchmarks.train`: the cost of a training step of each stage, by its parts, and the
speed of its data loader.

Weights and data are random. Times are the shortest of a few runs.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import typer

from benchmarks import device, dialogues
from benchmarks.sizes import SIZES, for_training
from omni2_jax import devices, sharding
from omni2_jax.audio import features
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.configs import flow, stage1a, stage1b, stage2
from omni2_jax.console import run_function
from omni2_jax.models import layers
from omni2_jax.train import overrides, step
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.loader import Loader, catalogue, filled, schedule
from omni2_jax.train.metrics import Clock
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.step import SingleObjective

CONFIGS = {module.config.stage: module.config for module in (stage1a, stage1b, stage2, flow)}
TINY_BATCH = 4
console = rich.console.Console()


class Bench:
    """A stage with random weights, and its data in `folder`."""

    def __init__(self, train: TrainConfig, config: Omni2Config, folder: Path):
        self.train, self.stage = train, stage_of(train)
        self.steps = train.steps or 1
        self.config = self.stage.configure(config)
        self.mesh = sharding.make_mesh(*dataclasses.astuple(train.mesh))
        dialogues.write(folder, train, config, max(2 * train.batch, 64))
        self.examples = self.stage.examples(
            self.config, cast(Tokenizer, dialogues.WordTokenizer(config)), Dataset(folder), "data"
        )
        indices = range(len(self.examples.data))
        self.catalogue = catalogue(self.examples, indices, train.buckets[:1], strict=True)
        self.loader = self.load(self.steps)
        self.batch, _ = next(self.loader.start(0))
        self.weights, trained, self.frozen = for_training(self.stage, self.config, self.mesh)
        self.objective = SingleObjective(self.stage, self.weights, self.steps)
        self.shardings = self.objective.shardings(trained, self.mesh)
        begin = jax.jit(self.objective.initial, out_shardings=self.shardings, donate_argnums=0)
        self.state = begin(trained)

    def load(self, steps: int) -> Loader:
        """A loader of so many batches."""
        batches = schedule(self.catalogue, dataclasses.replace(self.train, steps=steps))
        rows = sharding.row_sharding(self.mesh)
        return Loader(self.examples, self.catalogue, batches, rows)

    def compile(self) -> float:
        """Compile the step; the seconds that it took."""
        start = time.perf_counter()
        jitted = step.compile_step(self.objective, self.shardings)
        self.take_step = jitted.lower(self.state, self.frozen, self.batch).compile()
        return time.perf_counter() - start

    def once(self):
        """One step on the same batch."""
        self.state, metrics = self.take_step(self.state, self.frozen, self.batch)
        return self.state, metrics

    def from_loader(self) -> tuple[float, float]:
        """Steps as the training loop takes them: (seconds a step, share of it spent waiting for
        data).

        The first two steps, which fill the buffers, do not count.
        """
        clock, pending = Clock(), None
        for number, (batch, _) in enumerate(clock.timed(self.loader.start(0))):
            self.state, metrics = self.take_step(self.state, self.frozen, batch)
            jax.device_get(pending)
            pending = metrics
            clock.steps += 1
            if number == 1:
                clock.read()
        jax.device_get(pending)
        return clock.read()

    def loader_alone(self) -> float:
        """Batches a second without any steps, after the batches that were read ahead."""
        ahead = self.loader.options.prefetch_buffer_size
        assert isinstance(ahead, int)
        start = time.perf_counter()
        for number, (batch, _) in enumerate(self.load(5 * ahead).start(0), 1):
            jax.block_until_ready(batch)
            if number == ahead:
                start = time.perf_counter()
        return 4 * ahead / (time.perf_counter() - start)

    def breakdown(self) -> dict[str, float]:
        """Seconds of the parts of a step, each compiled by itself."""
        times = {}
        for name, work in self.stage.frozen_work().items():
            times[name] = self.frozen_seconds(work)
        params, key = self.state.params, jax.random.key(0)
        forward = step.compile_validation(self.objective)
        times["forward"] = device.seconds(lambda: forward(params, self.frozen, self.batch), 3)
        gradients = jax.jit(self.objective.gradients)
        times["forward and backward"] = device.seconds(
            lambda: gradients(params, self.frozen, self.batch, key)[0], 3
        )
        _, _, grads = gradients(params, self.frozen, self.batch, key)
        update = jax.jit(
            self.objective.update, donate_argnums=0, out_shardings=(self.shardings, None)
        )

        def updated():
            self.state, norm = update(self.state, grads)
            return self.state, norm

        times["optimizer"] = device.seconds(updated, 3)
        return times

    def frozen_seconds(self, work: Callable[[Any, dict], Any]) -> float:
        """Seconds of a computation of frozen parts for one batch."""

        @jax.jit
        def run(params: dict, frozen: dict, batch: dict):
            model = self.objective.model(params, frozen)
            return jax.lax.map(lambda microbatch: work(model, microbatch), batch)

        return device.seconds(lambda: run(self.state.params, self.frozen, self.batch), 3)


def log_mel(config: Omni2Config, segments: int, workers: int) -> dict[str, float]:
    """Milliseconds for the log-mel of one segment.

    "device": in a batch on the device; "thread": on one thread of the host; "workers": on the host,
    all workers busy.
    """
    random, size = np.random.default_rng(0), config.segment_samples
    noise = random.standard_normal((segments, size)).astype(np.float32)
    on_device = jnp.asarray(noise)
    on_host = jax.device_put(noise[:1], jax.local_devices(backend="cpu")[0])

    def one(_: int = 0) -> jax.Array:
        return jax.block_until_ready(features.log_mel(on_host))

    times = {
        "device": 1000 * device.seconds(lambda: features.log_mel(on_device)) / segments,
        "thread": 1000 * device.seconds(one),
    }
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        list(pool.map(one, range(4 * workers)))
        times["workers"] = 1000 * (time.perf_counter() - start) / (4 * workers)
    return times


def peak_rate(dtype: str) -> tuple[float, str]:
    """The highest FLOPs a second of the device, and the source of this number."""
    known = devices.peak_flops(jax.devices()[0]) if dtype == "bfloat16" else None
    if known:
        return known, "data sheet"
    return device.matmul_rate(jnp.dtype(dtype)), "measured, a large matmul"


def measure(
    train: TrainConfig,
    config: Omni2Config,
    folder: Path,
    parts: bool = True,
    ready: Path | None = None,
) -> dict:
    """All figures of one stage; the JSON of --json is a list of these.

    parts: those of a step, too. ready: see `device.wait_for_turn`.
    """
    bench, bucket = Bench(train, config, folder), train.buckets[0]
    with sharding.use(bench.mesh):
        compile_seconds = bench.compile()
        device.wait_for_turn(ready)
        rate, rate_source = peak_rate(train.dtype)
        seconds = device.seconds(bench.once)
        memory = bench.take_step.memory_analysis()
        allocated = jax.local_devices()[0].memory_stats()
        loop_seconds, data_wait = bench.from_loader()
        breakdown = bench.breakdown() if parts else {}
    batches = bench.loader_alone()
    counted = bench.stage.flops(bench.config, bench.weights.shapes, bucket)
    total = sum(both for _, both in counted.values())
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    sizes |= {"peak_in_use": allocated["peak_bytes_in_use"]} if allocated else {}
    segments = min(train.batch, 32)
    return {
        "stage": train.stage,
        "device": f"{bench.mesh.size} x {jax.devices()[0].device_kind}",
        "dtype": train.dtype,
        "batch": train.batch,
        "microbatches": train.microbatches,
        "remat": train.remat,
        "bucket": dataclasses.asdict(bucket),
        "trained": sum(leaf.size for leaf in bench.state.params.values()),
        "frozen": sum(leaf.size for leaf in bench.frozen.values()),
        "seconds": seconds,
        "tokens_per_s": train.batch * bucket.size / seconds,
        "filled": filled(bench.catalogue, bench.loader.source.batches),
        "flops": total,
        "flops_by_part": {part: both for part, (_, both) in counted.items()},
        "peak_flops_per_s": rate,
        "peak_from": rate_source,
        "mfu": total / seconds / rate / bench.mesh.size,
        "breakdown_s": breakdown,
        "loop_seconds": loop_seconds,
        "data_wait": data_wait,
        "loader_batches_per_s": batches,
        "loader_over_demand": batches * seconds,
        "log_mel_ms": log_mel(config, segments, train.workers) if bucket.segments else None,
        "memory": sizes,
        "compile_s": compile_seconds,
    }


def report(size: str, figures: dict) -> None:
    """Print the figures of a stage as a table."""
    title = f"stage {figures['stage']} of {size}, {figures['dtype']}, {figures['device']}"
    table = rich.table.Table(show_header=False, title=title)
    for name, value in (*step_rows(figures), *data_rows(figures), *memory_rows(figures)):
        table.add_row(name, value)
    console.print(table)


def step_rows(figures: dict) -> Iterator[tuple[str, str]]:
    """The rows of the table on the step itself."""
    bucket = figures["bucket"]
    yield (
        "parameters",
        f"{figures['trained'] / 1e6:.1f} M trained, {figures['frozen'] / 1e6:.1f} M frozen",
    )
    yield (
        "batch",
        f"{figures['batch']} rows of {bucket['segments']} segments, "
        f"{bucket['positions']} positions, "
        f"{bucket['tokens']} tokens, {100 * figures['filled']:.0f} % of them filled; "
        f"microbatches {figures['microbatches']}, remat {figures['remat']}",
    )
    yield (
        "a step",
        f"{1000 * figures['seconds']:.1f} ms, "
        f"{figures['tokens_per_s']:.0f} tokens/s (with padding)",
    )
    yield (
        "MFU",
        f"{100 * figures['mfu']:.1f} % of {figures['peak_flops_per_s'] / 1e12:.2f} TFLOP/s "
        f"({figures['peak_from']}); {figures['flops'] / 1e12:.3f} TFLOP a step",
    )
    for name, seconds in figures["breakdown_s"].items():
        yield f"  {name}", f"{1000 * seconds:.1f} ms"


def data_rows(figures: dict) -> Iterator[tuple[str, str]]:
    """The rows of the table on the data."""
    batches = figures["loader_batches_per_s"]
    yield (
        "with the loader",
        f"{1000 * figures['loop_seconds']:.1f} ms a step, "
        f"{100 * figures['data_wait']:.1f} % of it waiting for data",
    )
    yield (
        "the loader alone",
        f"{batches:.1f} batches/s, {batches * figures['batch']:.0f} rows/s, "
        f"{figures['loader_over_demand']:.1f} times what the step takes",
    )
    if mel := figures["log_mel_ms"]:
        yield (
            "log-mel of a segment",
            f"device {mel['device']:.2f} ms, a thread {mel['thread']:.2f} ms, "
            f"all workers {mel['workers']:.2f} ms",
        )


def memory_rows(figures: dict) -> Iterator[tuple[str, str]]:
    """The rows of the table on memory and compilation."""
    sizes = [
        f"{name.replace('_', ' ')} {size / 1e9:.2f} GB" for name, size in figures["memory"].items()
    ]
    yield "memory", ", ".join(sizes)
    yield "compiling the step", f"{figures['compile_s']:.1f} s"


def main(
    size: Annotated[
        str, typer.Option(help=f"Dimensions, one of {', '.join(SIZES)}; the weights are random.")
    ] = "tiny",
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(CONFIGS)} (repeatable). [default: all]"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rows. [default: the stage's own; {TINY_BATCH} at tiny size]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps with the loader.")] = 20,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE"),
    ] = None,
    cudnn: Annotated[
        bool, typer.Option(help="cuDNN's attention, where the GPU has it, or XLA's own.")
    ] = True,
    parts: Annotated[
        bool, typer.Option(help="Measure the parts of a step, too; each is compiled by itself.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    ready: Annotated[
        Path | None,
        typer.Option(help="Create this file when all is compiled; measure after a line on stdin."),
    ] = None,
) -> None:
    """Measure the training step of each stage, in the first of its buckets."""
    if unknown := {size} - SIZES.keys() | set(stage or ()) - CONFIGS.keys():
        raise ValueError(
            f"there is no {', '.join(unknown)}; --size is one of {', '.join(SIZES)}, "
            f"--stage of {', '.join(CONFIGS)}"
        )
    if not cudnn:
        layers.has_fused_attention = lambda q: False
    defaults = [f"batch={batch or TINY_BATCH}"] if batch or size == "tiny" else []
    defaults += ["dtype=float32"] if jax.default_backend() == "cpu" else []
    configs = [
        overrides.changed(
            dataclasses.replace(CONFIGS[name], steps=steps + 2), [*defaults, *(changes or [])]
        )
        for name in stage or CONFIGS
    ]
    figures = []
    for train in configs:
        with tempfile.TemporaryDirectory() as folder:
            figures.append(measure(train, SIZES[size], Path(folder) / "data", parts, ready))
        report(size, figures[-1])
        if json_file:
            json_file.write_text(json.dumps({"size": size, "stages": figures}, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

"""`python -m benchmarks.train`: what a training step of each stage costs and where its time goes, and whether the data keep up."""

import dataclasses
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import typer
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import device, dialogues
from benchmarks.sizes import SIZES, for_training
from omni2_jax import sharding
from omni2_jax.audio import features
from omni2_jax.cli.console import run_function
from omni2_jax.config import Omni2Config
from omni2_jax.configs import flow, stage1a, stage1b, stage2
from omni2_jax.train import flops, stages, step
from omni2_jax.train import settings as settings
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.loader import Loader, catalogue, filled, schedule
from omni2_jax.train.examples import CLIP, Examples
from omni2_jax.train.loop import timed
from omni2_jax.train.metrics import Clock
from omni2_jax.train.settings import TrainConfig

STAGES = {"1a": stage1a.config, "1b": stage1b.config, "2": stage2.config, "flow": flow.config}
PIECES = {  # what comes before anything that is trained
    "1a": {"features, speech encoder": stages.hear},
    "1b": {},
    "2": {"features, speech encoder": stages.hear, "the same, adapter, LLM": stages.read_dialogue},
    "flow": {"features, speaker encoder": stages.listen},
}
TINY_BATCH = 4
console = rich.console.Console()


class Bench:
    """A stage with random weights, and its data."""

    def __init__(self, train: TrainConfig, config: Omni2Config, folder: Path):
        self.train, self.config = train, config.replace(mix=train.mix)
        self.mesh = sharding.make_mesh(*dataclasses.astuple(train.mesh))
        dialogues.write(folder, train, config, max(2 * train.batch, 64))
        self.examples = Examples(train, self.config, dialogues.Words(config), Dataset(folder))
        self.found = catalogue(
            self.examples, range(len(self.examples.data)), train.buckets[:1], strict=True
        )
        self.loader = self.load(train.steps)
        self.batch, _ = next(self.loader.start(0))
        self.weights, trained, self.frozen = for_training(train, self.config, self.mesh)
        self.where = step.shardings(train, self.weights, trained, self.mesh, train.steps)
        begin = jax.jit(
            lambda params: step.initial(train, params, train.steps),
            out_shardings=self.where,
            donate_argnums=0,
        )
        self.state = begin(trained)

    def load(self, steps: int) -> Loader:
        batches = schedule(self.found, dataclasses.replace(self.train, steps=steps))
        return Loader(
            self.examples,
            self.found,
            batches,
            NamedSharding(self.mesh, PartitionSpec(sharding.Rules().batch)),
        )

    def compile(self) -> float:
        """Compile the step; the seconds that it took."""
        start = time.perf_counter()
        self.take = (
            step.make(self.train, self.weights, self.train.steps, self.where)
            .lower(self.state, self.frozen, self.batch)
            .compile()
        )
        return time.perf_counter() - start

    def once(self):
        self.state, measured = self.take(self.state, self.frozen, self.batch)
        return self.state, measured

    def from_loader(self) -> tuple[float, float]:
        """As the training loop does: (seconds a step, share of it waited for data). The first two steps fill the buffers."""
        clock, pending = Clock(), None
        for number, (batch, _) in enumerate(timed(self.loader.start(0), clock)):
            self.state, measured = self.take(self.state, self.frozen, batch)
            jax.device_get(pending)
            pending = measured
            clock.steps += 1
            if number == 1:
                clock.look()
        jax.device_get(pending)
        return clock.look()

    def loader_alone(self) -> float:
        """Batches a second when nobody computes, once those that were read ahead are used up."""
        ahead = self.loader.options.prefetch_buffer_size
        for number, (batch, _) in enumerate(self.load(5 * ahead).start(0), 1):
            jax.block_until_ready(batch)
            if number == ahead:
                start = time.perf_counter()
        return 4 * ahead / (time.perf_counter() - start)

    def breakdown(self) -> dict[str, float]:
        """Seconds of the parts of a step, each compiled by itself."""
        train, weights, found, key = self.train, self.weights, {}, jax.random.key(0)
        for name, piece in PIECES[train.stage].items():

            def mapped(params, frozen, batch, piece=piece):
                model = weights.model(step.cast(train, params), frozen)
                return jax.lax.map(lambda micro: piece(model, train, micro), batch)

            run = jax.jit(mapped)
            found[name] = device.seconds(lambda: run(self.state.params, self.frozen, self.batch), 3)  # noqa: B023
        forward = step.make_validation(train, weights)
        found["forward"] = device.seconds(
            lambda: forward(self.state.params, self.frozen, self.batch), 3
        )
        both = jax.jit(step.gradients(train, weights))
        found["forward and backward"] = device.seconds(
            lambda: both(self.state.params, self.frozen, self.batch, key)[0], 3
        )
        _, _, grads = both(self.state.params, self.frozen, self.batch, key)
        update = jax.jit(
            step.update(train, train.steps), donate_argnums=0, out_shardings=(self.where, None)
        )

        def updated():
            self.state, norm = update(self.state, grads)
            return self.state, norm

        found["optimizer"] = device.seconds(updated, 3)
        return found


def log_mel(clips: int, workers: int) -> dict[str, float]:
    """Milliseconds for the log-mel of a clip of 30 s: on the device in a batch, on a host thread, and with all worker threads busy."""
    noise = np.random.default_rng(0).standard_normal((clips, CLIP)).astype(np.float32)
    on_device, on_host = (
        jnp.asarray(noise),
        jax.device_put(noise[:1], jax.local_devices(backend="cpu")[0]),
    )
    one = lambda _=None: jax.block_until_ready(features.log_mel(on_host))  # noqa: E731
    found = {
        "device": 1000 * device.seconds(lambda: features.log_mel(on_device)) / clips,
        "thread": 1000 * device.seconds(one),
    }
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        list(pool.map(one, range(4 * workers)))
        found["workers"] = 1000 * (time.perf_counter() - start) / (4 * workers)
    return found


def peak_rate(dtype: str) -> tuple[float, str]:
    """FLOPs a second that the device can do at best, and where that is from."""
    known = flops.peak(jax.devices()[0]) if dtype == "bfloat16" else None
    return (
        (known, "data sheet")
        if known
        else (device.matmul_rate(jnp.dtype(dtype)), "measured, a large matmul")
    )


def measure(train: TrainConfig, config: Omni2Config, folder: Path) -> dict:
    rate = peak_rate(train.dtype)  # before threads read ahead
    bench, bucket = Bench(train, config, folder), train.buckets[0]
    with sharding.use(bench.mesh):
        compiled = bench.compile()
        seconds = device.seconds(bench.once)
        memory, allocated = bench.take.memory_analysis(), jax.local_devices()[0].memory_stats()
        looped, waited = bench.from_loader()
        parts = bench.breakdown()
    batches, rows = (
        bench.loader_alone(),
        train.batch * (bucket.positions + max(bucket.clips, 1) * bucket.tokens),
    )
    counted = flops.parts(train, bench.config, bench.weights.shapes, bucket)
    total = sum(both for _, both in counted.values())
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
        "tokens_per_s": rows / seconds,
        "filled": filled(bench.found, bench.loader.source.batches),
        "flops": total,
        "flops_by_part": {part: both for part, (_, both) in counted.items()},
        "peak_flops_per_s": rate[0],
        "peak_from": rate[1],
        "mfu": total / seconds / rate[0] / bench.mesh.size,
        "breakdown_s": parts,
        "loop_seconds": looped,
        "data_wait": waited,
        "loader_batches_per_s": batches,
        "loader_over_demand": batches * seconds,
        "log_mel_ms": log_mel(min(train.batch, 32), train.workers) if bucket.clips else None,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        | ({"peak_in_use": allocated["peak_bytes_in_use"]} if allocated else {}),
        "compile_s": compiled,
    }


def report(size: str, found: dict) -> None:
    """The same figures as a table."""
    bucket, memory, ms = found["bucket"], found["memory"], 1000 * found["seconds"]
    table = rich.table.Table(
        show_header=False,
        title=f"stage {found['stage']} of {size}, {found['dtype']}, {found['device']}",
    )
    rows = {
        "parameters": f"{found['trained'] / 1e6:.1f} M trained, {found['frozen'] / 1e6:.1f} M frozen",
        "batch": f"{found['batch']} rows of {bucket['clips']} clips, {bucket['positions']} positions, {bucket['tokens']} tokens, "
        f"{100 * found['filled']:.0f} % of them filled; microbatches {found['microbatches']}, remat {found['remat']}",
        "a step": f"{ms:.1f} ms, {found['tokens_per_s']:.0f} tokens/s (padding with them)",
        "MFU": f"{100 * found['mfu']:.1f} % of {found['peak_flops_per_s'] / 1e12:.2f} TFLOP/s ({found['peak_from']}); "
        f"{found['flops'] / 1e12:.3f} TFLOP a step",
    }
    rows |= {
        f"  {name}": f"{1000 * seconds:.1f} ms" for name, seconds in found["breakdown_s"].items()
    }
    rows |= {
        "through the loader": f"{1000 * found['loop_seconds']:.1f} ms a step, {100 * found['data_wait']:.1f} % of it waiting for data",
        "the loader alone": f"{found['loader_batches_per_s']:.1f} batches/s, {found['loader_batches_per_s'] * found['batch']:.0f} rows/s, "
        f"{found['loader_over_demand']:.1f} times what the step takes",
    }
    if mel := found["log_mel_ms"]:
        rows["log-mel of a clip"] = (
            f"device {mel['device']:.2f} ms, a thread {mel['thread']:.2f} ms, all workers {mel['workers']:.2f} ms"
        )
    rows |= {
        "memory": ", ".join(
            f"{name.replace('_', ' ')} {size / 1e9:.2f} GB" for name, size in memory.items()
        ),
        "compiling the step": f"{found['compile_s']:.1f} s",
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def main(
    size: Annotated[
        str, typer.Option(help=f"Dimensions, one of {', '.join(SIZES)}; the weights are random.")
    ] = "tiny",
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(STAGES)} (repeatable). [default: all]"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rows. [default: the stage's own; {TINY_BATCH} at tiny size]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to run through the loader.")] = 20,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure the training step of each stage, in the first of its buckets."""
    if unknown := {size} - SIZES.keys() | set(stage or ()) - STAGES.keys():
        raise ValueError(
            f"there is no {', '.join(unknown)}; --size is one of {', '.join(SIZES)}, --stage of {', '.join(STAGES)}"
        )
    given = [f"batch={batch or TINY_BATCH}"] if batch or size == "tiny" else []
    given += ["dtype=float32"] if jax.default_backend() == "cpu" else []
    wanted = [dataclasses.replace(STAGES[name], steps=steps + 2) for name in stage or STAGES]
    try:
        wanted = [settings.changed(train, [*given, *(changes or [])]) for train in wanted]
    except ValueError as error:
        raise ValueError(str(error)) from None
    found = []
    for train in wanted:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(train, SIZES[size], Path(folder) / "data"))
        report(size, found[-1])
        if json_file:
            json_file.write_text(json.dumps({"size": size, "stages": found}, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

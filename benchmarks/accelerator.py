"""`python -m benchmarks.accelerator --minutes 8`: what an accelerator does, the most telling first.

Each measurement is a process of its own, since flags of XLA are read once: `benchmarks.stream` for
serving, `benchmarks.train` for training. Its figures are written when it ends, and the page of
figures (`figures.md`) with them, so that being cut off loses nothing. A measurement that fails, or
that the time runs out for, is noted; one that has its figures already is not repeated, so the same
command goes on where it stopped.

Most of the time goes into compiling, which uses the processor. So the processes of a group load and
compile at the same time. When all of them are ready, each measures while the others wait.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.sizes import SIZES
from omni2_jax import files
from omni2_jax.checkpoint import parameters
from omni2_jax.console import run_function, say
from omni2_jax.models.model import abstract_model

# Loops, or loops and branches, as CUDA graphs.
LOOPS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE"}
BRANCHES = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"}
SHORTEST = 20  # seconds; with less left, no measurement is begun
# What was compiled is kept for the next call of this command, however little time it took.
CACHED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# The processes of a group share a GPU's memory, and none of them takes all of it; a TPU belongs to
# one process.
GIGABYTES = 70  # of a device that has 80
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Measurement:
    """A command that writes its figures as JSON to the path given by --json.

    It also has the option --ready (see `device.wait_for_turn`).
    """

    name: str
    arguments: tuple[str, ...]  # of `python -m`
    gpu: bool = False  # whether it tells something on GPUs only
    gigabytes: float = 0  # of the device's memory that it may need
    environment: Mapping[str, str] = field(default_factory=dict)


def measurements(
    sizes: Sequence[str], slots: Sequence[int], steps: int, gpu: bool = True
) -> list[Measurement]:
    """All of them, the most telling first. sizes: the smallest first. gpu: those for GPUs, too."""
    stream = ("benchmarks.stream", "--steps", str(steps), "--chunk", "10", "--left-chunks", "3")

    def serving(name: str, size: str, count: int, *options: str, **how) -> Measurement:
        arguments = (*stream, "--size", size, "--slots", str(count), *options)
        return Measurement(name, arguments, gigabytes=gigabytes_to_serve(size, count), **how)

    def one(size: str, name: str = "", *options: str, **how) -> Measurement:
        return serving(f"one speaker, {size}{name}", size, 1, *(options or ("--no-parts",)), **how)

    def speakers(size: str, count: int) -> Measurement:
        return serving(f"{count} speakers, {size}", size, count, "--no-parts")

    def training(size: str, stage: str, name: str = "", *options: str, **how) -> Measurement:
        arguments = ("benchmarks.train", "--size", size, "--stage", stage, "--steps", "8")
        arguments += ("--no-parts", *options)
        return Measurement(f"stage {stage}, {size}{name}", arguments, gigabytes=20, **how)

    small = sizes[0]
    planned = [
        *(one(size) for size in sizes),
        speakers(small, slots[0]),
        training(small, "1a"),
        *(one(size, ", int8", "--int8", "--no-parts") for size in sizes[::-1]),
        training(small, "2"),
        training(small, "1a", ", without cuDNN", "--no-cudnn", gpu=True),
        one(small, ", loops as CUDA graphs", gpu=True, environment=LOOPS),
        one(small, ", loops and branches as CUDA graphs", gpu=True, environment=BRANCHES),
        one(small, ", by parts", "--parts"),
        *(speakers(small, count) for count in slots[1:]),
        *(speakers(size, slots[0]) for size in sizes[1:]),
    ]
    return [one for one in planned if gpu or not one.gpu]


def gigabytes_to_serve(size: str, slots: int) -> float:
    """Of the device's memory: bfloat16 weights, twice while they are drawn, and state of slots.

    A slot with chunks of 10 units and 3 chunks before them has 0.23 GB of caches (AOT.md).
    """
    _, model = abstract_model(SIZES[size].replace(speaker=None))
    numbers = sum(leaf.size for leaf in parameters.flatten(model).values())
    return 2 * 2 * numbers / 1e9 + 0.25 * slots


class Process:
    """A measurement that runs.

    path: where its figures will lie; its output is beside it. settings: more of its environment.
    """

    def __init__(self, measurement: Measurement, path: Path, **settings: str):
        self.path, self.start = path, time.monotonic()
        self.ready = path.with_suffix(".ready")
        for left_over in (self.path, self.ready):
            left_over.unlink(missing_ok=True)
        environment = os.environ | CACHED | settings | dict(measurement.environment)
        files = ("--json", str(path), "--ready", str(self.ready))
        with open(path.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *measurement.arguments, *files],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def prepare(self, deadline: float) -> None:
        """Wait until it is ready to measure, or ends, or the time (`time.monotonic`) is over."""
        while self.process.poll() is None and not self.ready.exists():
            if time.monotonic() > deadline:
                return self.end()
            time.sleep(0.1)

    def figures(self, deadline: float) -> dict:
        """Let it measure, until the deadline at most -> its figures, or {"failed": why}."""
        was_ready = self.ready.exists()
        try:
            self.process.communicate(b"go\n", timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            pass
        finally:  # Ctrl-C, too, must leave nothing running on the device
            self.end()
        took = {"took_s": time.monotonic() - self.start}
        if self.process.returncode == 0:
            return json.loads(self.path.read_text()) | took
        if self.process.returncode == -signal.SIGKILL:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
            what = "measuring" if was_ready else "compiling"
            return found | {"failed": f"the time ran out while it was {what}"} | took
        lines = self.path.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        failed = lines[-1] if lines else f"exit code {self.process.returncode}"
        return {"failed": failed} | took

    def end(self) -> None:
        """Kill it, with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ready.unlink(missing_ok=True)


def groups_of(planned: Sequence[Measurement], together: int) -> list[list[Measurement]]:
    """Measurements that prepare at the same time, in their order: so many at most, and no more than
    fit the memory."""
    groups: list[list[Measurement]] = []
    for measurement in planned:
        last = groups[-1] if groups else []
        needed = sum(one.gigabytes for one in [*last, measurement])
        if last and len(last) < together and needed <= GIGABYTES:
            last.append(measurement)
        else:
            groups.append([measurement])
    return groups


def figures_of(name: str, result: Mapping) -> Iterator[tuple[str, str, str]]:
    """The rows of the page for one measurement: (its name, what, figure)."""
    if "failed" in result:
        yield name, "failed", result["failed"]
    for stage in result.get("stages", ()):
        yield name, "device", stage["device"]
        yield name, "MFU", f"{100 * stage['mfu']:.1f} %"
        yield name, "a step", f"{1000 * stage['seconds']:.1f} ms"
        yield name, "waiting for data", f"{100 * stage['data_wait']:.1f} %"
        yield name, "compilation", f"{stage['compile_s']:.0f} s"
    if "rtf" in result:
        yield name, "device", result["device"]
        if "warm_up_s" in result:  # older results lack it
            yield name, "compiling", f"{result['warm_up_s']:.0f} s"
        yield name, "first audio, from features", f"{result['first_audio_ms']:.0f} ms"
        yield name, "real-time factor", f"{result['rtf']:.4f}"
    if profile := result.get("profile"):
        yield name, "kernels and copies in a step", str(profile["kernels"])
        yield name, "the device is busy, of a step", f"{100 * profile['busy']:.0f} %"
    for slots, rate in result.get("audio_s_per_s", {}).items():
        yield name, f"audio a second, {slots} slots", f"{rate:.1f} s"
    if any(int(slots) > 1 for slots in result.get("audio_s_per_s", ())):
        yield name, "speakers at once, deadlines kept", str(result["realtime_speakers"])
    if roof := result.get("roofline"):
        yield name, "copy bandwidth, measured", f"{roof['copy_bytes_per_s'] / 1e9:.0f} GB/s"
        for what, part, key in (
            ("a text token", "text", "text_token_ms"),
            ("a unit", "units", "unit_ms"),
            ("flow and vocoder, a step", "flow and vocoder", "flow_vocoder_ms"),
        ):
            share = f"{100 * roof[part]['fraction']:.0f} % of what the device allows"
            yield name, what, f"{result[key]:.2f} ms, {share}"


def page(results: Mapping[str, Mapping]) -> str:
    """All figures as a table in Markdown."""
    lines = ["# Figures", "", "| measurement | what | figure |", "| --- | --- | --- |"]
    for name, result in results.items():
        lines += [f"| {' | '.join(row)} |" for row in figures_of(name, result)]
    return "\n".join(lines) + "\n"


def write(out: Path, results: Mapping[str, Mapping]) -> None:
    """Write all results so far, and the page of figures."""
    with files.atomic_write(out / "results.json") as file:
        json.dump(results, file, indent=1)
    with files.atomic_write(out / "figures.md") as file:
        file.write(page(results))


def measure(
    planned: Sequence[Measurement], out: Path, seconds: float, together: int = 1
) -> dict[str, dict]:
    """Run measurements in their order until the time is over -> {name: figures}.

    Those of an earlier call that are in `out` already are kept. together: how many prepare at the
    same time; one of them that fails, for lack of memory perhaps, is tried again by itself.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").absolute()))
    deadline, path = time.monotonic() + seconds, out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    waiting = [one for one in planned if "failed" in results.get(one.name, {"failed": ""})]
    groups = groups_of(waiting, together)
    for group in groups:
        names = "; ".join(measurement.name for measurement in group)
        left = deadline - time.monotonic()
        if left < SHORTEST:
            say(f"{left:.0f} s are left; not begun: {names}")
            continue
        say(f"preparing ({left:.0f} s left): {names}")
        shared = SHARED if len(group) > 1 else {}
        started: list[Process] = []
        try:
            for measurement in group:
                number = planned.index(measurement) + 1
                started.append(Process(measurement, out / f"{number}.json", **shared))
            for process in started:  # the time for measuring what is ready by then stays
                process.prepare(max(deadline - SHORTEST * len(group), deadline - left / 2))
            for measurement, process in zip(group, started, strict=True):
                say(f"{measurement.name} ({deadline - time.monotonic():.0f} s left)")
                results[measurement.name] = process.figures(deadline)
                write(out, results)
                for _, what, figure in figures_of(measurement.name, results[measurement.name]):
                    say(f"    {what}: {figure}")
        finally:
            for process in started:
                process.end()
        if len(group) > 1:
            groups += [[one] for one in group if "failed" in results[one.name]]
    return results


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after so long.")] = 8,
    out: Annotated[
        Path, typer.Option(help="Where results go; those that are there are kept.")
    ] = Path("accelerator"),
    size: Annotated[
        list[str] | None, typer.Option(help="Dimensions (repeatable). [default: 0.5b, 7b]")
    ] = None,
    slots: Annotated[
        list[int] | None, typer.Option(help="Speakers at once (repeatable). [default: 64, 256]")
    ] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps of one answer (0.4 s each).")] = 20,
    together: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measurements that prepare at the same time. [default: one for every three "
            "processor cores on a GPU, 1 elsewhere]",
        ),
    ] = None,
) -> None:
    """Measure serving and training on this machine's accelerator, the most telling first."""
    sizes = size or ["0.5b", "7b"]
    if unknown := set(sizes) - SIZES.keys():
        raise ValueError(f"there is no size {', '.join(unknown)}; it is one of {', '.join(SIZES)}")
    out.mkdir(parents=True, exist_ok=True)
    gpu = shutil.which("nvidia-smi") is not None
    planned = measurements(sizes, slots or [64, 256], steps, gpu)
    together = together or (max((os.cpu_count() or 1) // 3, 1) if gpu else 1)
    measure(planned, out, 60 * minutes, together)
    say(f"the figures are in {out / 'figures.md'}")


if __name__ == "__main__":
    run_function(main)

"""`python -m benchmarks.accelerator --minutes 8`: what an accelerator does, the most telling first.

Each measurement is a process of its own, since flags of XLA are read once: `benchmarks.stream` for
serving, `benchmarks.train` for training. Its figures are written when it ends, and the page of
figures (`figures.md`) with them, so that being cut off loses nothing. A measurement that fails, or
that the time runs out for, is noted; one that has its figures already is not repeated, so the same
command goes on where it stopped.

Most of the time goes into compiling, which uses the processor. So some measurements run at the same
time first, for what they compile, and then each again by itself, from the compilation cache.
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
from omni2_jax.cli.console import run_function, say

GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE"}  # loops as CUDA graphs
SHORTEST = 20  # seconds; with less left, no measurement is begun
# A measurement that is repeated has to find everything in the cache; of those that run at the same
# time, none may take all of the device's memory.
CACHED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Measurement:
    """A command that writes its figures as JSON to the path given by --json."""

    name: str
    arguments: tuple[str, ...]  # of `python -m`
    gpu: bool = False  # whether it tells something on GPUs only
    environment: Mapping[str, str] = field(default_factory=dict)


def measurements(
    sizes: Sequence[str], slots: Sequence[int], steps: int, gpu: bool = True
) -> list[Measurement]:
    """All of them, the most telling first. sizes: the smallest first. gpu: those for GPUs, too."""
    stream = ("benchmarks.stream", "--steps", str(steps), "--chunk", "10", "--left-chunks", "3")

    def speakers(size: str, count: int) -> Measurement:
        arguments = (*stream, "--size", size, "--slots", str(count), "--no-parts")
        return Measurement(f"{count} speakers, {size}", arguments)

    def one(size: str, name: str = "", *options: str, **how) -> Measurement:
        return Measurement(f"one speaker, {size}{name}", (*stream, "--size", size, *options), **how)

    def training(size: str, stage: str, name: str = "", *options: str, **how) -> Measurement:
        arguments = ("benchmarks.train", "--size", size, "--stage", stage, "--steps", "8")
        return Measurement(
            f"stage {stage}, {size}{name}", (*arguments, "--no-parts", *options), **how
        )

    small = sizes[0]
    planned = [
        one(small),
        *(one(size, "", "--no-parts") for size in sizes[1:]),
        training(small, "1a"),
        one(small, ", loops as CUDA graphs", "--no-parts", gpu=True, environment=GRAPHS),
        speakers(small, slots[0]),
        training(small, "2"),
        training(small, "1a", ", without cuDNN", "--no-cudnn", gpu=True),
        *(one(size, ", int8", "--int8", "--no-parts") for size in sizes[::-1]),
        *(speakers(size, slots[0]) for size in sizes[1:]),
        *(speakers(small, count) for count in slots[1:]),
    ]
    return [one for one in planned if gpu or not one.gpu]


class Process:
    """A measurement that runs.

    path: where its figures will lie; its output is beside it. settings: more of its environment.
    """

    def __init__(self, measurement: Measurement, path: Path, **settings: str):
        self.path, self.start = path, time.monotonic()
        environment = os.environ | CACHED | settings | dict(measurement.environment)
        with open(path.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *measurement.arguments, "--json", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def figures(self, seconds: float) -> dict:
        """Wait for so long at most -> its figures, or {"failed": why}."""
        try:
            code = self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # Ctrl-C, too, must leave nothing running on the device
            self.end()
        took = time.monotonic() - self.start
        if code == 0:
            return json.loads(self.path.read_text()) | {"took_s": took}
        if code is None:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
            return found | {"failed": f"the time ran out after {took:.0f} s", "took_s": took}
        lines = self.path.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {code}", "took_s": took}

    def end(self) -> None:
        """Kill it, with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compile_together(planned: Sequence[Measurement], out: Path, seconds: float) -> list[dict]:
    """Run measurements at the same time, for so long at most, for what they compile.

    Returns their figures, which are of programs that disturb one another. One that fails, for lack
    of memory perhaps, compiles later.
    """
    deadline, folder = time.monotonic() + seconds, out / "compiling"
    folder.mkdir(exist_ok=True)
    started: list[Process] = []
    try:
        for number, measurement in enumerate(planned):
            started.append(Process(measurement, folder / f"{number}.json", **SHARED))
        return [process.figures(deadline - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.end()


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

    Those of an earlier call that are in `out` already are kept. together: how many compile at the
    same time, which takes half of the time that is left at most; with 1 each compiles as it is
    measured.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").absolute()))
    deadline, path = time.monotonic() + seconds, out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    waiting = [one for one in planned if "failed" in results.get(one.name, {"failed": ""})]
    while waiting:
        group, waiting = waiting[:together], waiting[together:]
        left = deadline - time.monotonic()
        if len(group) > 1 and left > 2 * SHORTEST:
            say(f"compiling: {'; '.join(one.name for one in group)} ({left:.0f} s left)")
            found = compile_together(group, out, left / 2)
            beside = {"failed": "measured beside other programs only"}
            results |= {m.name: f | beside for m, f in zip(group, found, strict=True)}
            write(out, results)
        for measurement in group:
            left = deadline - time.monotonic()
            if left < SHORTEST:
                say(f"{left:.0f} s are left: {measurement.name} is not begun")
                return results
            say(f"{measurement.name} ({left:.0f} s left)")
            number = planned.index(measurement) + 1
            result = Process(measurement, out / f"{number}.json").figures(left)
            results[measurement.name] = result
            write(out, results)
            for _, what, figure in figures_of(measurement.name, result):
                say(f"    {what}: {figure}")
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
        int, typer.Option(min=1, help="Measurements that compile at the same time.")
    ] = 4 if (os.cpu_count() or 1) >= 8 else 1,
) -> None:
    """Measure serving and training on this machine's accelerator, the most telling first."""
    sizes = size or ["0.5b", "7b"]
    if unknown := set(sizes) - SIZES.keys():
        raise ValueError(f"there is no size {', '.join(unknown)}; it is one of {', '.join(SIZES)}")
    out.mkdir(parents=True, exist_ok=True)
    planned = measurements(sizes, slots or [64, 256], steps, shutil.which("nvidia-smi") is not None)
    measure(planned, out, 60 * minutes, together)
    say(f"the figures are in {out / 'figures.md'}")


if __name__ == "__main__":
    run_function(main)

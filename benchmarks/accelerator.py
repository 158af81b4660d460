"""`python -m benchmarks.accelerator --minutes 8`: what an accelerator does, the most telling first.

Each measurement is a process of its own, since flags of XLA are read once: `benchmarks.stream` for
serving, `benchmarks.train` for training. Its figures are written when it ends, and the page of
figures (`figures.md`) with them, so that being cut off loses nothing. A measurement that fails, or
that the time runs out for, is noted; one that has its figures already is not repeated, so the same
command goes on where it stopped.

Most of the time goes into compiling, which uses the processor. So several processes load and
compile at the same time. As soon as one is ready it measures, and the others are paused meanwhile.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
# Processes share a GPU's memory: each takes what it needs, and one by itself nearly all of it. JAX
# would take three quarters at once, and no more. A TPU belongs to one process.
GIGABYTES = 70  # of a device that has 80
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
SETTLE = 0.1  # seconds from pausing other processes to measuring


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
        *(
            one(size, ", loops and branches as CUDA graphs", gpu=True, environment=BRANCHES)
            for size in sizes
        ),
        one(small, ", by parts", "--parts"),
        *(speakers(small, count) for count in slots[1:]),
        *(speakers(size, slots[0]) for size in sizes[1:]),
    ]
    return [one for one in planned if gpu or not one.gpu]


def chosen(planned: Sequence[Measurement], parts: Sequence[str] | None) -> list[Measurement]:
    """Those the names of which contain one of `parts`, in the order of `parts`; None: all.

    Raises ValueError for a part that is in no name.
    """
    found = list(planned) if parts is None else []
    for part in parts or ():
        if not (named := [one for one in planned if part in one.name]):
            names = "; ".join(one.name for one in planned)
            raise ValueError(f"no measurement has {part!r} in its name; they are: {names}")
        found += [one for one in named if one not in found]
    return found


def gigabytes_to_serve(size: str, slots: int) -> float:
    """Of the device's memory: bfloat16 weights, twice while they are drawn, and state of slots.

    A slot with chunks of 10 units and 3 chunks before them has 0.23 GB of caches (AOT.md).
    """
    _, model = abstract_model(SIZES[size].replace(speaker=None))
    numbers = sum(leaf.size for leaf in parameters.flatten(model).values())
    return 2 * 2 * numbers / 1e9 + 0.25 * slots


class Process:
    """A measurement that runs. Its figures will lie in `out`, and its output is beside them."""

    def __init__(self, measurement: Measurement, out: Path):
        self.measurement, self.start = measurement, time.monotonic()
        self.path = out / (re.sub("[^a-z0-9.]+", "-", measurement.name) + ".json")
        self.ready = self.path.with_suffix(".ready")
        for left_over in (self.path, self.ready):
            left_over.unlink(missing_ok=True)
        environment = os.environ | CACHED | SHARED | dict(measurement.environment)
        files = ("--json", str(self.path), "--ready", str(self.ready))
        with open(self.path.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *measurement.arguments, *files],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def prepares(self) -> bool:
        """Whether it still loads and compiles, and has not ended."""
        return self.process.poll() is None and not self.ready.exists()

    def send(self, what: signal.Signals) -> None:
        """Send a signal to it and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)

    def figures(self, deadline: float) -> dict:
        """Let it measure, until the deadline at most -> its figures, or {"failed": why}."""
        was_ready = self.ready.exists()
        try:
            self.process.communicate(b"go\n", timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            pass
        finally:  # Ctrl-C, too
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
        self.send(signal.SIGKILL)
        self.process.wait()
        self.ready.unlink(missing_ok=True)


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
    """Run measurements until the time is over -> {name: figures}.

    Those of an earlier call that are in `out` already are kept. They begin in their order, and so
    many at most prepare together. One that fails beside others, for lack of memory perhaps, is
    tried again by itself.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").absolute()))
    deadline, path = time.monotonic() + seconds, out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    waiting = [one for one in planned if "failed" in results.get(one.name, {"failed": ""})]
    running: list[Process] = []
    shared: set[str] = set()  # the names of those that ran beside others
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            while waiting and left >= SHORTEST and fits(waiting[0], running, together):
                say(f"preparing {waiting[0].name} ({left:.0f} s left)")
                running.append(Process(waiting.pop(0), out))
                if len(running) > 1:
                    shared |= {process.measurement.name for process in running}
            if not running:
                say(f"{left:.0f} s are left; not begun: {'; '.join(one.name for one in waiting)}")
                break
            ready = next((process for process in running if not process.prepares()), None)
            if ready is None and left > 0:
                time.sleep(0.1)
                continue
            # What still compiles when the time is over has failed, one after the other.
            process = ready or running[0]
            running.remove(process)
            measurement = process.measurement
            result = results[measurement.name] = undisturbed(process, running, deadline)
            write(out, results)
            for _, what, figure in figures_of(measurement.name, result):
                say(f"    {what}: {figure}")
            if "failed" in result and measurement.name in shared and time.monotonic() < deadline:
                shared.remove(measurement.name)
                waiting.append(replace(measurement, gigabytes=GIGABYTES))
    finally:  # Ctrl-C, too, must leave nothing running on the device
        for process in running:
            process.end()
    return results


def fits(measurement: Measurement, running: Sequence[Process], together: int) -> bool:
    """Whether a measurement can prepare beside those that run."""
    needed = measurement.gigabytes + sum(one.measurement.gigabytes for one in running)
    return not running or (len(running) < together and needed <= GIGABYTES)


def undisturbed(process: Process, others: Sequence[Process], deadline: float) -> dict:
    """The figures of a process, measured while the others are paused."""
    say(f"{process.measurement.name} ({deadline - time.monotonic():.0f} s left)")
    for other in others:
        other.send(signal.SIGSTOP)
    time.sleep(SETTLE if others else 0)
    try:
        return process.figures(deadline)
    finally:
        for other in others:
            other.send(signal.SIGCONT)


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
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only measurements the names of which contain this (repeatable)."),
    ] = None,
) -> None:
    """Measure serving and training on this machine's accelerator, the most telling first."""
    sizes = size or ["0.5b", "7b"]
    if unknown := set(sizes) - SIZES.keys():
        raise ValueError(f"there is no size {', '.join(unknown)}; it is one of {', '.join(SIZES)}")
    gpu = shutil.which("nvidia-smi") is not None
    planned = chosen(measurements(sizes, slots or [64, 256], steps, gpu), only)
    out.mkdir(parents=True, exist_ok=True)
    together = together or (max((os.cpu_count() or 1) // 3, 1) if gpu else 1)
    measure(planned, out, 60 * minutes, together)
    say(f"the figures are in {out / 'figures.md'}")


if __name__ == "__main__":
    run_function(main)

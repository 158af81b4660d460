"""What the device can do at best, measured, and what it did, from the profiler's trace."""

import collections
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def wait_for_turn(ready: Path | None) -> None:
    """Create this file, which says that all is loaded and compiled, and wait for a line on stdin.

    So `benchmarks.accelerator` lets several programs prepare at the same time and measure one after
    the other. None: go on at once.
    """
    if ready is not None:
        ready.touch()
        sys.stdin.readline()


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of several runs, the compiling one not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of passes over 256 MB.

    Many in a call, since an accelerator needs as long to start a call as for a pass; and in place:
    otherwise a CPU spends most of the time on new pages.
    """
    passes = 2 if jax.default_backend() == "cpu" else 32
    x = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x), donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * passes * x.nbytes / seconds(run)


def matmul_rate(dtype: jnp.dtype) -> float:
    """FLOPs a second of a large square matmul."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * n**3 / seconds(lambda: multiply(x))


def traced(run: Callable[[], Any]) -> dict | None:
    """What a GPU did during a call of a compiled program (see `busy`); None on other devices."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds = time.perf_counter() - start
        paths = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(paths[0])).planes if paths else ()
        events = [
            (event.name, event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return busy(events, seconds) if events else None


def busy(events: Iterable[tuple[str, float, float]], seconds: float, most: int = 20) -> dict:
    """A summary of kernels and copies (name, start, duration in ns) within so many seconds.

    busy: the share of the time in which at least one ran. kernels: how many. largest: those that
    took most, by name without its number, as [name, seconds, how often].
    """
    spans = sorted((start, start + duration) for _, start, duration in events)
    covered, end = 0.0, float("-inf")
    for start, stop in spans:
        covered += max(stop - max(start, end), 0)
        end = max(end, stop)
    times: dict[str, float] = collections.defaultdict(float)  # nanoseconds
    counts = collections.Counter()
    for name, _, duration in events:
        base = name.rstrip("0123456789").rstrip("_.")
        times[base] += duration
        counts[base] += 1
    longest = sorted(times, key=lambda name: -times[name])[:most]
    return {
        "seconds": seconds,
        "busy": covered / 1e9 / seconds,
        "kernels": len(spans),
        "largest": [[name, times[name] / 1e9, counts[name]] for name in longest],
    }

"""What the device can do at best, measured: copy bandwidth and matmul rate."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
    """Bytes a second, read and written, of a pass over 256 MB.

    The pass is in place: otherwise a CPU spends most of the time on new pages.
    """
    x = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * x.nbytes / seconds(run)


def matmul_rate(dtype: jnp.dtype) -> float:
    """FLOPs a second of a large square matmul."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * n**3 / seconds(lambda: multiply(x))

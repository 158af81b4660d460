"""What a late step of an answer costs beside an early one, and how much of that is attention."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.stream_bench import Bench
from omni2_jax.models.flow.attention import cached_attention
from omni2_jax.models.flow.mask import Window

REPEATS = 3  # two steps each, and one pair to compile: an answer of 5 steps has room for no more


def make_attention(bench: Bench) -> Callable[[int], float]:
    """A function: units that arrived before a step -> seconds of the estimator's attention in it.

    The attention runs by itself, over the cache of the engine.
    """
    plan, rate = bench.flow.plan, bench.config.flow.upsample
    arrays = jax.tree.leaves(bench.flow.cache.estimator.kv.pairs)
    layers = len(arrays)  # of one iteration: one, or where each has an array of its own all
    passes, rows, heads, places, size = arrays[0].shape

    @functools.partial(jax.jit, donate_argnames="kv")
    def run(kv, ones, bias, num_keys):
        width, num_keys = ones.shape[1], jnp.full(rows, num_keys)
        window = Window(
            valid=jnp.ones((rows, width), bool),
            query=jnp.zeros((rows, width), jnp.int32),
            key=jnp.zeros((rows, places), jnp.int32),
            bias=bias,
            num_keys=num_keys,
            ring_start=jnp.maximum(num_keys - width, 0),
            read_sizes=tuple(rate * size for size in plan.read_sizes),
        )

        def run_pass(carry, number):
            q, kv = carry[0], carry[1].of_pass(number, layers)
            for _ in range(layers):
                q, kv = cached_attention(q, q, ones, window.bias, window, kv)
                kv = kv.next_layer()
            return (q, kv.between_steps()), None

        return jax.lax.scan(run_pass, (ones, kv), jnp.arange(passes))[0]

    def seconds(units: int) -> float:
        flow = bench.flow
        ready, opened = units + plan.write - plan.lookahead, bench.open_chunk(units)
        needed = min(ready, plan.chunks.end(opened)) - opened
        width = rate * next(w for w in plan.window_buckets if w >= needed)
        inputs = (
            jnp.ones((rows, width, heads, size // 2)),
            jnp.zeros((rows, 1, width, places)),
            jnp.array(min(rate * ready, places)),
        )
        start = time.perf_counter()
        _, kv = jax.block_until_ready(run(flow.cache.estimator.kv, *inputs))
        took = time.perf_counter() - start
        estimator = dataclasses.replace(flow.cache.estimator, kv=kv)
        cache = dataclasses.replace(flow.cache, estimator=estimator)
        bench.set_flow(dataclasses.replace(flow, cache=cache))
        return took

    return seconds


def compare(bench: Bench, early: int, late: int) -> dict:
    """How many times the cost of step `early` step `late` has.

    `predicted` is the same if only the attention over the longer past costs more. The steps are
    measured in turns: the speed of a shared machine may change during the minutes of a long answer
    by more than the difference.
    """
    attention_seconds, streams = make_attention(bench), bench.fill()
    steps, attention = {early: [], late: []}, {early: [], late: []}
    for repeat in range(REPEATS + 1):
        for step in (early, late):
            units = (step - 2) * bench.config.write  # in the middle of a chunk of 50
            bench.move_to(units)
            step_time, attention_time = bench.step()[0], attention_seconds(units)
            if repeat:  # the first one compiles the attention
                steps[step].append(1000 * step_time)
                attention[step].append(1000 * attention_time)
    bench.empty(streams)
    step_ms = [statistics.median(steps[step]) for step in (early, late)]
    attention_ms = [statistics.median(attention[step]) for step in (early, late)]
    return {
        "from": early,
        "to": late,
        "measured": step_ms[1] / step_ms[0],
        "predicted": 1 + (attention_ms[1] - attention_ms[0]) / step_ms[0],
        "step_ms": step_ms,
        "attention_ms": attention_ms,
    }

"""Bytes and FLOPs of one streaming step, counted from the dimensions.

Every weight is read once in a pass, and used once for each position.
"""

import collections
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from omni2_jax.config import DecoderConfig, Omni2Config
from omni2_jax.generate import streaming_step
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.models.flow.streaming import StreamPlan


@dataclass(frozen=True)
class Work:
    """Bytes that are read, and floating-point operations."""

    bytes: float
    flops: float

    def least_seconds(self, bandwidth: float, rate: float) -> float:
        """The least time for this work. bandwidth: bytes a second. rate: FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def count(tree) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def decoder_pass(lm: DecoderConfig, params: dict, head: int, slots: int, capacity: int) -> Work:
    """One token of every slot through a language model that reads its whole KV cache.

    head: how many rows of the output head are computed. capacity: positions of the KV cache.
    """
    width = params["norm"]["scale"].dtype.itemsize
    layers, rows = count(params["layers"]), head * lm.width
    weights = size(params["layers"]) + rows * (1 if lm.weights == "int8" else width)
    cache = 2 * lm.layers * lm.kv_heads * lm.head_size * capacity * slots
    attention = 4 * lm.layers * lm.heads * lm.head_size * capacity * slots
    return Work(weights + cache * width, 2 * (layers + rows) * slots + attention)


def times(work: Work, passes: float) -> Work:
    return Work(work.bytes * passes, work.flops * passes)


def step(config: Omni2Config, params: dict, engine_config: EngineConfig) -> dict[str, Work]:
    """The work of one step of all slots, by stage of the step."""
    text = decoder_pass(
        config.llm,
        params["llm"],
        config.llm.vocabulary,
        engine_config.slots,
        engine_config.llm_capacity,
    )
    unit = decoder_pass(
        config.speech_lm,
        params["speech_lm"],
        config.units + 1,
        engine_config.slots,
        engine_config.speech_capacity,
    )
    return {
        "text": times(text, config.read),
        "units": times(unit, config.write),
        "flow": flow(config, params["flow"], engine_config),
        "vocoder": vocoder(config, params["vocoder"], engine_config),
    }


def flow(config: Omni2Config, params: dict, engine_config: EngineConfig) -> Work:
    """The flow's passes in an average step, if every step writes W units."""
    windows = usual_windows(streaming_step.plan_of(config, engine_config))
    passes = [
        times(flow_pass(config, params, engine_config, window), passes)
        for window, passes in windows.items()
    ]
    return Work(sum(work.bytes for work in passes), sum(work.flops for work in passes))


def flow_pass(config: Omni2Config, params: dict, engine_config: EngineConfig, window: int) -> Work:
    """One pass over `window` units of every slot.

    The encoder runs once, the estimator for each Euler step and guidance branch. Where the flow
    sees all of the past, the past is as long as the cache.
    """
    c = config.flow
    past = c.upsample * past_units(config, engine_config)
    frames, branches = c.upsample * window, 2 * c.steps
    # The width of all attentions together.
    width = (2 + c.mid_blocks) * c.blocks * c.estimator_heads * c.estimator_head_size
    attention = 4 * width * frames * (frames + past)
    cached = 2 * width * past * jnp.dtype(engine_config.flow_cache_dtype).itemsize
    flops = 2 * count(params["encoder"]) * frames + branches * (
        2 * count(params["estimator"]) * frames + attention
    )
    read = (
        size(params["encoder"])
        + c.steps * size(params["estimator"])
        + branches * engine_config.slots * cached
    )
    return Work(read, flops * engine_config.slots)


def past_units(config: Omni2Config, engine_config: EngineConfig) -> int:
    """Units before its own chunk that a frame of the flow attends to, at most."""
    if engine_config.flow_left_chunks is None:
        return engine_config.max_units
    return engine_config.flow_left_chunks * (engine_config.flow_chunk or config.flow.chunk)


def usual_windows(plan: StreamPlan) -> dict[int, float]:
    """{window size in units: passes of that size in a step, on average}, if every step writes W."""
    steps, passes = 20 * plan.chunks.size, collections.Counter()
    start = done = 0  # the open chunk's first unit, and the first unit without a mel
    for step in range(1, steps + 1):
        ready = step * plan.write - plan.lookahead
        while done < ready:
            end = int(plan.chunks.end(start))
            done = min(ready, end)
            passes[next(width for width in plan.window_buckets if width >= done - start)] += 1
            start = end if done == end else start
    return {int(width): float(count / steps) for width, count in passes.items()}


def vocoder(config: Omni2Config, params: dict, engine_config: EngineConfig) -> Work:
    """The new frames and the overlap. A stage uses its weights once a position, at its own rate."""
    c = config.vocoder
    frames = c.overlap + config.flow.upsample * (config.write + config.flow.lookahead)
    flops, rate = 2 * count([params["conv_in"], params["f0"]]) * frames, 1
    for stage, factor in zip(params["stages"].values(), c.upsample, strict=True):
        rate *= factor
        flops += 2 * count(stage) * frames * rate
    flops += 2 * count(params["conv_out"]) * frames * rate
    return Work(size(params), flops * engine_config.slots)

"""Bytes and FLOPs of one streaming step, counted from the dimensions: every weight is read once a pass and used once a position."""

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
    """Bytes moved and floating-point operations."""

    bytes: float
    flops: float

    def least_seconds(self, bandwidth: float, rate: float) -> float:
        """What the device needs at best for this."""
        return max(self.bytes / bandwidth, self.flops / rate)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def decoder_pass(lm: DecoderConfig, params: dict, head: int, slots: int, capacity: int) -> Work:
    """One token of every slot through a language model with `head` rows of its head, reading its whole cache."""
    width = params["norm"]["scale"].dtype.itemsize
    layers, rows = count(params["layers"]), head * lm.width
    cache = 2 * lm.layers * lm.kv_heads * lm.head_size * capacity * slots
    attention = 4 * lm.layers * lm.heads * lm.head_size * capacity * slots
    return Work((layers + rows + cache) * width, 2 * (layers + rows) * slots + attention)


def times(work: Work, passes: float) -> Work:
    return Work(work.bytes * passes, work.flops * passes)


def step(config: Omni2Config, params: dict, engine_config: EngineConfig) -> dict[str, Work]:
    """What one step of all slots has to do, by stage."""
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
    """The passes of an average step of full writes."""
    windows = usual_windows(streaming_step.plan_of(config, engine_config))
    passes = [
        times(flow_pass(config, params, engine_config, window), often)
        for window, often in windows.items()
    ]
    return Work(sum(work.bytes for work in passes), sum(work.flops for work in passes))


def flow_pass(config: Omni2Config, params: dict, engine_config: EngineConfig, window: int) -> Work:
    """`window` units of every slot: the encoder once, the estimator for each Euler step and guidance branch.

    Where the flow sees all of its past, as long a one as there is room for.
    """
    c = config.flow
    seen = (
        engine_config.max_units
        if engine_config.flow_left_chunks is None
        else engine_config.flow_left_chunks * (engine_config.flow_chunk or c.chunk)
    )
    frames, past, branches = c.upsample * window, c.upsample * seen, 2 * c.steps
    width = (
        (2 + c.mid_blocks) * c.blocks * c.estimator_heads * c.estimator_head_size
    )  # of all attentions
    attention, kept = (
        4 * width * frames * (frames + past),
        2 * width * past * jnp.dtype(engine_config.flow_cache_dtype).itemsize,
    )
    flops = 2 * count(params["encoder"]) * frames + branches * (
        2 * count(params["estimator"]) * frames + attention
    )
    moved = (
        size(params["encoder"])
        + c.steps * size(params["estimator"])
        + branches * engine_config.slots * kept
    )
    return Work(moved, flops * engine_config.slots)


def usual_windows(plan: StreamPlan) -> dict[int, float]:
    """The sizes of windows that steps of full writes compute, and how many of each a step does on average."""
    steps, found = 20 * plan.chunks.size, collections.Counter()
    start = given = 0
    for step in range(1, steps + 1):
        ready = step * plan.write - plan.lookahead
        while given < ready:
            end = plan.chunks.end(start)
            given = min(ready, end)
            found[next(width for width in plan.window_buckets if width >= given - start)] += 1
            start = end if given == end else start
    return {width: times / steps for width, times in found.items()}


def vocoder(config: Omni2Config, params: dict, engine_config: EngineConfig) -> Work:
    """The new frames and the overlap: a stage's weights are used once a position of its own rate."""
    c = config.vocoder
    frames = c.overlap + config.flow.upsample * (config.write + config.flow.lookahead)
    flops, rate = 2 * count([params["conv_in"], params["f0"]]) * frames, 1
    for stage, factor in zip(params["stages"].values(), c.upsample, strict=True):
        rate *= factor
        flops += 2 * count(stage) * frames * rate
    flops += 2 * count(params["conv_out"]) * frames * rate
    return Work(size(params), flops * engine_config.slots)

"""Whether so many sessions can speak in real time, measured before the first client comes."""

import statistics
import time

import jax.numpy as jnp
import numpy as np

from omni2_jax.config import UNITS_PER_SECOND
from omni2_jax.generate.engine import Engine, PromptPiece
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import Request

STEPS = 6


def step_seconds(engine: Engine) -> float:
    """The median time of a step while every slot speaks. The engine must be warm and idle."""
    config = engine.config
    features = jnp.zeros((config.speech_positions, config.llm.width), engine.dtype)
    piece = PromptPiece(np.zeros(1, np.int32), features, 0)
    # Forced, so that no text ends early.
    text = [0] * config.read * (STEPS + 2)
    request = Request.of(config, Options(max_flush_units=1)).saying(text)
    voice = jnp.ones(config.flow.speaker) if config.flow else None
    streams = [engine.submit([piece], request, voice) for _ in range(engine.engine_config.slots)]
    engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    for stream in streams:
        stream.cancel()
    return statistics.median(times)


def describe(engine: Engine, seconds: float) -> str:
    """One line for the operator. seconds: of a step."""
    slots, speech = engine.engine_config.slots, engine.config.write / UNITS_PER_SECOND
    line = (
        f"{slots} sessions at once: {seconds * 1000:.0f} ms of computing for "
        f"{speech * 1000:.0f} ms of speech"
    )
    if seconds > speech and engine.config.flow:
        line += "; this is slower than real time, so answers will have gaps: give fewer --sessions"
    return line

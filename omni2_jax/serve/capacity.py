"""Whether so many sessions can speak in real time, measured before the first client comes."""

import statistics
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.config import UNITS_PER_SECOND
from omni2_jax.generate.engine import Engine, PromptPiece
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import Request

if TYPE_CHECKING:
    from omni2_jax.generate.omni2 import Omni2

STEPS = 6
MOST = 64  # sessions that are tried
# A step may take this share of the duration of the speech that it makes; the rest is for encoding
# questions and for other programs.
SHARE = 0.6


def most_sessions(model: "Omni2", options: Options, context: int) -> int:
    """The largest number of sessions, of 1, 2, 4, ... MOST, that speak in real time; at least 1.

    options, context: see `Worker`. Each number compiles a program, which is kept on disk. The
    engine of the largest number is kept, others are given up. A number is too large, too, if the
    device has no memory for it beside the engine of half of it.
    """
    speech, context = model.config.write / UNITS_PER_SECOND, min(context, model.config.max_prompt)
    most, slots = 1, 1
    while slots <= MOST:
        try:
            engine = model.engine(options, context, slots)
            engine.warm_up()
            if step_seconds(engine) > SHARE * speech:
                break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or slots == 1:
                raise
            break
        most, slots = slots, 2 * slots
        keep(model, most)
    keep(model, most)
    return most


def keep(model: "Omni2", slots: int) -> None:
    """Give up the engines of other numbers of slots."""
    model.engines = {c: engine for c, engine in model.engines.items() if c.slots == slots}


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
    for error in filter(None, (stream.error for stream in streams)):
        raise error
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
        f"sessions at once: {slots}; {seconds * 1000:.0f} ms of computing for "
        f"{speech * 1000:.0f} ms of speech"
    )
    if seconds > speech and engine.config.flow:
        line += "; this is slower than real time, so answers will have gaps"
        line += ": give fewer --sessions" if slots > 1 else ""
    return line

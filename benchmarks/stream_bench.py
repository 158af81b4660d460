"""An engine whose slots all speak, to measure one step, a whole answer and the first audio."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import Omni2Config
from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import Request
from omni2_jax.models.model import SPEECH

SPARE_STEPS = 8  # steps for which there is room behind the longest answer


def engine_config_for(config: Omni2Config, slots: int, steps: int, **settings) -> EngineConfig:
    """Buffers for answers of so many steps; `settings` are other fields of EngineConfig."""
    units = (steps + SPARE_STEPS) * config.write
    text = (steps + SPARE_STEPS) * config.read
    prompt = config.speech_positions + 84
    return EngineConfig(
        slots=slots,
        prefill_size=prompt,
        llm_capacity=prompt + text,
        speech_capacity=units + text,
        max_units=units,
        **settings,
    )


class Bench:
    """An engine, compiled and warm, whose answers do not end by themselves."""

    def __init__(
        self, config: Omni2Config, graph: nnx.GraphDef, params: dict, engine_config: EngineConfig
    ):
        assert config.llm and config.flow
        self.config, self.engine_config = config, engine_config
        self.engine = Engine(config, graph, params, engine_config)
        positions = config.speech_positions
        ids = np.array([1] * 30 + [SPEECH] * positions + [1] * 10, np.int32)
        features = jnp.zeros((positions, config.llm.width), self.engine.dtype)
        self.piece = PromptPiece(ids, features, 0)
        self.voice = jnp.ones(config.flow.speaker)
        # No text token ends the answer, so that every step reads R tokens and writes W.
        max_text = engine_config.llm_capacity - engine_config.prefill_size - 4 * config.read
        options = Options(max_new_tokens=max_text, max_flush_units=1)
        self.request = Request.of(config, options, text_eos=())
        self.engine.warm_up()
        streams = self.fill()
        # Every window size is slow when it runs for the first time.
        for _ in range(-(-self.flow.plan.max_open_units // config.write) + 1):
            self.step()
        self.empty(streams)

    @property
    def flow(self):
        """The flow's state of all slots."""
        flow = self.engine.state.flow
        assert flow is not None
        return flow

    def fill(self) -> list[ResponseStream]:
        """Start an answer in every slot and wait until all prompts are computed."""
        streams = []
        for _ in range(self.engine_config.slots):
            streams.append(self.engine.submit([self.piece], self.request, self.voice))
            self.engine.admit()
        jax.block_until_ready(self.engine.state)
        return streams

    def empty(self, streams: list[ResponseStream]) -> None:
        """Cancel answers."""
        for stream in streams:
            stream.cancel()

    def step(self) -> tuple[float, float]:
        """Run one step, fetch its output -> (seconds in all, seconds until the call returned)."""
        engine, start = self.engine, time.perf_counter()
        engine.state, packed = engine.programs.step(engine.params, engine.state)
        called = time.perf_counter()
        np.asarray(packed)
        return time.perf_counter() - start, called - start

    def answer(self, steps: int) -> tuple[list[float], float]:
        """Seconds of every step of an answer, and the median seconds that Python took for one."""
        streams = self.fill()
        times = [self.step() for _ in range(steps)]
        self.empty(streams)
        return [total for total, _ in times], statistics.median(called for _, called in times)

    def first_audio(self, repeats: int = 3) -> float:
        """Seconds from speech features on the device to the first samples on the host."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            stream = self.engine.submit([self.piece], self.request, self.voice)
            next(output for output in stream if len(output.samples))
            times.append(time.perf_counter() - start)
            stream.cancel()
        return min(times)

    def open_chunk(self, units: int) -> int:
        """The first unit of the flow chunk that is open when so many units have arrived."""
        plan = self.flow.plan
        return max(plan.chunks.end(units - plan.lookahead) - plan.chunks.size, 0)

    def move_to(self, units: int) -> None:
        """Set the state of every slot as if so many units had arrived and lay in the cache."""
        flow, start = self.flow, self.open_chunk(units)
        size, shift = flow.plan.capacity, flow.plan.chunks.shift
        cached_units = start - 1 - (start - 1 + shift - np.arange(size)) % size
        values = {
            "num_units": units,
            "num_delivered": units - flow.plan.lookahead,
            "chunk_start": start,
            "cached_units": np.maximum(cached_units, -1),
        }
        arrays = {}
        for name, value in values.items():
            old = getattr(flow, name)
            new = np.broadcast_to(value, old.shape).astype(old.dtype)
            arrays[name] = jax.device_put(new, old.sharding)
        self.set_flow(dataclasses.replace(flow, **arrays))

    def set_flow(self, flow) -> None:
        """Replace the flow's state."""
        self.engine.state = dataclasses.replace(self.engine.state, flow=flow)

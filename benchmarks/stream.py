"""`python -m benchmarks.stream`: how fast the streaming step is, what it costs as an answer grows, and how many speakers it serves."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import typer
from flax import nnx

from benchmarks import device, roofline
from benchmarks.sizes import SIZES, load
from omni2_jax.cli.console import run_function
from omni2_jax.config import UNITS_PER_SECOND
from omni2_jax.generate import read_write, streaming_step
from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write import ReadWriteOutput, Request
from omni2_jax.models.flow.attention import cached_attention
from omni2_jax.models.flow.mask import Window
from omni2_jax.models.model import SPEECH

POINTS = (5, 20, 50, 100)  # chunks whose cost is compared
TURNS = 3  # and one that compiles: two steps each, and an answer of 5 chunks has room for no more
console = rich.console.Console()


class Bench:
    """An engine whose slots all talk without end."""

    def __init__(self, config, graph, params, engine_config: EngineConfig):
        self.config, self.engine_config = config, engine_config
        self.engine = Engine(config, graph, params, engine_config)
        positions = config.speech_positions
        ids = np.array([1] * 30 + [SPEECH] * positions + [1] * 10, np.int32)
        self.piece = PromptPiece(
            ids, jnp.zeros((positions, config.llm.width), self.engine.dtype), 0
        )
        self.voice = jnp.ones(config.flow.speaker)
        # No text token ends the answer, so that every step reads R and writes W.
        room = engine_config.llm_capacity - engine_config.prefill_size - 4 * config.read
        self.request = Request.of(
            config, Options(max_new_tokens=room, max_flush_units=1), text_eos=()
        )
        self.engine.warm_up()
        streams = self.fill()
        for _ in range(
            -(-self.engine.state.flow.plan.max_open_units // config.write) + 1
        ):  # a window's every size, each of which is slow at first
            self.step()
        self.empty(streams)

    def fill(self) -> list[ResponseStream]:
        streams = [
            self.engine.submit([self.piece], self.request, self.voice)
            for _ in range(self.engine_config.slots)
        ]
        self.engine.admit()
        jax.block_until_ready(self.engine.state)
        return streams

    def step(self) -> tuple[float, float]:
        """One step by itself, read back: (seconds in all, seconds until the call returned)."""
        engine, start = self.engine, time.perf_counter()
        engine.state, packed = engine.programs.step(engine.params, engine.state)
        called = time.perf_counter()
        np.asarray(packed)
        return time.perf_counter() - start, called - start

    def opened(self, units: int) -> int:
        """The first unit of the chunk that is open when so many units have arrived."""
        chunks = self.engine.state.flow.plan.chunks
        return max(chunks.end(units - self.config.flow.lookahead) - chunks.size, 0)

    def place(self, units: int) -> None:
        """As if every slot had spoken so many units, which its memory holds."""
        flow, start = self.engine.state.flow, self.opened(units)
        size, shift = flow.plan.capacity, flow.plan.chunks.shift
        cached_units = start - 1 - (start - 1 + shift - np.arange(size)) % size
        values = {
            "num_units": units,
            "num_delivered": units - flow.plan.lookahead,
            "chunk_start": start,
            "cached_units": np.maximum(cached_units, -1),
        }
        fill = lambda old, new: jax.device_put(
            np.broadcast_to(new, old.shape).astype(old.dtype), old.sharding
        )  # noqa: E731
        flow = dataclasses.replace(
            flow, **{name: fill(getattr(flow, name), value) for name, value in values.items()}
        )
        self.engine.state = dataclasses.replace(self.engine.state, flow=flow)

    def empty(self, streams: list[ResponseStream]) -> None:
        for stream in streams:
            stream.cancel()

    def first_audio(self, repeats: int = 3) -> float:
        """Seconds from speech features on the device to the first samples on the host."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            stream = self.engine.submit([self.piece], self.request, self.voice)
            next(chunk for chunk in stream if len(chunk.samples))
            times.append(time.perf_counter() - start)
            stream.cancel()
        return min(times)


def sized(config, slots: int, chunks: int, **how) -> EngineConfig:
    """Capacities for answers of so many chunks."""
    positions = config.speech_positions
    room = (chunks + 8) * config.write
    prompt = positions + 84
    return EngineConfig(
        slots=slots,
        prefill_size=prompt,
        llm_capacity=prompt + (chunks + 8) * config.read,
        speech_capacity=room + (chunks + 8) * config.read,
        max_units=room,
        **how,
    )


def stages(config, graph, params, engine_config: EngineConfig, bench: Bench) -> dict[str, float]:
    """Milliseconds of the parts of a step, each compiled by itself, and of what comes before the first step."""
    merge = lambda params: nnx.merge(graph, params)  # noqa: E731
    slots = engine_config.slots
    tokens = jnp.zeros((slots, config.read), jnp.int32)
    hiddens, no = (
        jnp.zeros((slots, config.read, config.llm.width), bench.engine.dtype),
        jnp.zeros(slots, bool),
    )
    burst = ReadWriteOutput(
        tokens, jnp.full((slots, config.write), config.tokens.sep + 1), jnp.ones(slots, jnp.int32)
    )
    parts = {
        "text": lambda params, state: dataclasses.replace(
            state, language=read_write.read(merge(params), state.language)[0]
        ),
        "units": lambda params, state: dataclasses.replace(
            state,
            language=read_write.write(
                merge(params), state.language, tokens, hiddens, no, engine_config.units_only
            )[0],
        ),
        "flow and vocoder": lambda params, state: streaming_step.speak_step(
            merge(params), engine_config, state, burst, no
        )[0],
    }
    found, streams = {}, bench.fill()
    for name, part in parts.items():
        state, times = bench.engine.state, []
        where = jax.tree.map(
            lambda leaf: leaf.sharding, state
        )  # as the engine left it: elsewhere, its programs would be compiled again
        run = jax.jit(part, donate_argnums=1, out_shardings=where)
        for _ in range(6):
            start = time.perf_counter()
            state = jax.block_until_ready(run(params, state))
            times.append(time.perf_counter() - start)
        bench.engine.state = state
        found[name] = 1000 * statistics.median(times[1:])
    bench.empty(streams)
    mel = jnp.zeros(
        (1, 2 * config.speech_encoder.frames, config.speech_encoder.mels), bench.engine.dtype
    )
    hear = jax.jit(lambda params, mel: merge(params).encode_speech(mel))
    found["encoder"] = 1000 * device.seconds(lambda: hear(params, mel), 3)
    start = time.perf_counter()
    bench.empty(bench.fill())
    found["prefill"] = 1000 * (time.perf_counter() - start) / slots
    return found


def growth(bench: Bench, chunks: int) -> tuple[list[float], float]:
    """Seconds of every step of an answer of so many chunks, and the median seconds that Python took to dispatch one."""
    streams = bench.fill()
    steps = [bench.step() for _ in range(chunks)]
    bench.empty(streams)
    return [total for total, _ in steps], statistics.median(called for _, called in steps)


def around(times: list[float], chunk: int) -> float:
    """Milliseconds of a chunk, the median of it and its two neighbours on each side."""
    return 1000 * statistics.median(times[max(chunk - 3, 0) : chunk + 2])


def main(
    size: Annotated[
        str, typer.Option(help=f"Dimensions of random weights, one of {', '.join(SIZES)}.")
    ] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A converted checkpoint to measure instead.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Slots; throughput is measured at 1, 2, 4 ... up to this.")
    ] = 1,
    chunks: Annotated[int, typer.Option(min=5, help="Chunks of one answer (0.4 s each).")] = 100,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Units that the flow takes as one chunk. [default: the checkpoint's, 50]"
        ),
    ] = None,
    left_chunks: Annotated[
        int | None, typer.Option(help="Chunks that the flow sees before its own. [default: all]")
    ] = None,
    flow_cache_dtype: Annotated[
        str, typer.Option(help="dtype of the flow's KV cache: float32 or bfloat16.")
    ] = "float32",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure the streaming step: time to first audio, real-time factor, chunk cost, speakers, and the share of the roofline."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config, graph, params = load(size, checkpoint, dtype)
    how = {
        "flow_chunk": chunk,
        "flow_left_chunks": left_chunks,
        "flow_cache_dtype": flow_cache_dtype,
    }
    engine_config = sized(config, 1, chunks, **how)
    bench = Bench(config, graph, params, engine_config)
    compiled, speech = bench.engine.compilations(), config.write / UNITS_PER_SECOND
    times, dispatch = growth(bench, chunks)
    median = statistics.median(times)
    parts = stages(config, graph, params, engine_config, bench)
    figures = {
        "device": jax.devices()[0].device_kind,
        "size": str(checkpoint or size),
        "dtype": dtype.__name__,
        "batch": batch,
        "engine_config": dataclasses.asdict(engine_config),
        "first_audio_ms": 1000 * bench.first_audio(),
        "rtf": median / speech,
        "chunk_ms": {str(c): around(times, c) for c in POINTS if c <= chunks},
        "encoder_ms": parts["encoder"],
        "prefill_ms": parts["prefill"],
        "text_token_ms": parts["text"] / config.read,
        "unit_ms": parts["units"] / config.write,
        "flow_vocoder_ms": parts["flow and vocoder"],
        "dispatch_share": dispatch / median,
        "compilations": compiled,
        "compilations_during_answers": bench.engine.compilations() - compiled,
    }
    figures |= speakers(
        times,
        lambda slots: Bench(config, graph, params, sized(config, slots, chunks, **how)),
        batch,
        speech,
    )
    figures["roofline"] = against_roofline(config, params, engine_config, parts, dtype)
    compared = list(map(int, figures["chunk_ms"]))
    figures["growth"] = compare(bench, compared[0], compared[-1])
    report(figures)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def speakers(times: list[float], bench: Callable[[int], Bench], batch: int, speech: float) -> dict:
    """Audio seconds a second at 1, 2, 4 ... slots, and the most slots whose 95th percentile of step times keeps up with the speech.

    times: of one slot, measured already; speech: seconds of it in a step.
    """
    rates, most, slots, steps = (
        {},
        0,
        1,
        min(30, len(times)),
    )  # not more than there is room for: a step of idle slots costs nothing
    while True:
        rates[str(slots)] = slots * speech / statistics.median(times)
        if np.percentile(times, 95) <= speech:
            most = slots
        slots *= 2
        if slots > batch:
            return {"audio_s_per_s": rates, "realtime_speakers": most}
        times, _ = growth(bench(slots), steps)


def against_roofline(
    config, params, engine_config: EngineConfig, parts: dict[str, float], dtype
) -> dict:
    bandwidth = device.copy_bandwidth()
    rates = {"text": device.matmul_rate(dtype), "decoder": device.matmul_rate(jnp.float32)}
    work = roofline.step(config, params, engine_config)
    rows = {
        "text": ("text", "text"),
        "units": ("units", "text"),
        "flow and vocoder": (None, "decoder"),
    }
    found = {
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": rates["text"],
        "matmul_float32_flops_per_s": rates["decoder"],
    }
    for name, (stage, rate) in rows.items():
        least = [work[stage]] if stage else [work["flow"], work["vocoder"]]
        bound = 1000 * sum(w.least_seconds(bandwidth, rates[rate]) for w in least)
        found[name] = {
            "bytes": sum(w.bytes for w in least),
            "flops": sum(w.flops for w in least),
            "least_ms": bound,
            "ms": parts[name],
            "fraction": bound / parts[name],
        }
    return found


def attention(bench: Bench) -> Callable[[int], float]:
    """How many seconds of a step that begins after so many units the estimator's attention takes: by itself, over the engine's memory."""
    plan, rate = bench.engine.state.flow.plan, bench.config.flow.upsample
    layers, rows, heads, places, size = bench.engine.state.flow.cache.estimator.kv.pairs.shape

    @partial(jax.jit, donate_argnames="kv")
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

        def layer(carry, index):
            q, kv = carry
            y, kv = cached_attention(q, q, ones, window.bias, window, kv.at(index))
            return (y, kv.at(None)), None

        return jax.lax.scan(layer, (ones, kv), jnp.arange(layers))[0]

    def seconds(units: int) -> float:
        flow = bench.engine.state.flow
        ready, opened = units + plan.write - plan.lookahead, bench.opened(units)
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
        flow = dataclasses.replace(flow, cache=cache)
        bench.engine.state = dataclasses.replace(bench.engine.state, flow=flow)
        return took

    return seconds


def compare(bench: Bench, early: int, late: int) -> dict:
    """How many times the step of an early chunk that of a late one costs, and would cost if only attention to the longer past grew.

    They are timed in turn: during the minutes of a long answer a shared machine's own speed may change by more than what is asked for.
    """
    alone, streams = attention(bench), bench.fill()
    steps, shares = {early: [], late: []}, {early: [], late: []}
    for turn in range(TURNS + 1):
        for chunk in (early, late):
            units = (chunk - 2) * bench.config.write  # in the middle of a chunk of 50
            bench.place(units)
            times = bench.step()[0], alone(units)
            if turn:  # the first one compiles the attention
                steps[chunk].append(1000 * times[0])
                shares[chunk].append(1000 * times[1])
    bench.empty(streams)
    begin, end = (statistics.median(steps[chunk]) for chunk in (early, late))
    least, most = (statistics.median(shares[chunk]) for chunk in (early, late))
    found = {"step_ms": [begin, end], "attention_ms": [least, most]}
    return {
        "from": early,
        "to": late,
        "measured": end / begin,
        "predicted": 1 + (most - least) / begin,
    } | found


def report(figures: dict) -> None:
    """The same figures as tables."""
    table = rich.table.Table(
        show_header=False, title=f"{figures['size']}, {figures['dtype']}, {figures['device']}"
    )
    rows = {
        "time to first audio (features on the device)": f"{figures['first_audio_ms']:.0f} ms",
        "real-time factor, one speaker": f"{figures['rtf']:.3f}",
        "encoder and adapter, 30 s": f"{figures['encoder_ms']:.0f} ms",
        "prefill of a turn": f"{figures['prefill_ms']:.0f} ms",
        "a text token": f"{figures['text_token_ms']:.2f} ms",
        "a unit": f"{figures['unit_ms']:.2f} ms",
        "flow and vocoder, a chunk": f"{figures['flow_vocoder_ms']:.0f} ms",
        "step at chunk": ", ".join(f"{c}: {ms:.0f} ms" for c, ms in figures["chunk_ms"].items()),
        "growth, chunk {from} to {to}".format(
            **figures["growth"]
        ): "measured {measured:.2f}, by attention alone {predicted:.2f}".format(
            **figures["growth"]
        ),
        "Python's share of a step": f"{100 * figures['dispatch_share']:.1f} %",
        "compilations (warm-up, answers)": f"{figures['compilations']}, {figures['compilations_during_answers']}",
        "audio seconds a second, by slots": ", ".join(
            f"{n}: {rate:.2f}" for n, rate in figures["audio_s_per_s"].items()
        ),
        "speakers in real time (p95)": str(figures["realtime_speakers"]),
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    table = rich.table.Table(
        "stage of a step", "MB moved", "GFLOP", "at best, ms", "measured, ms", "of the roofline"
    )
    for name in ("text", "units", "flow and vocoder"):
        w = figures["roofline"][name]
        numbers = (w["bytes"] / 1e6, w["flops"] / 1e9, w["least_ms"], w["ms"])
        table.add_row(name, *(f"{n:.1f}" for n in numbers), f"{100 * w['fraction']:.0f} %")
    console.print(table)
    copied, multiplied = (
        figures["roofline"]["copy_bytes_per_s"],
        figures["roofline"]["matmul_flops_per_s"],
    )
    console.print(
        f"copy {copied / 1e9:.1f} GB/s, matmul {multiplied / 1e12:.2f} TFLOP/s, measured in this run",
        highlight=False,
    )


if __name__ == "__main__":
    run_function(main)

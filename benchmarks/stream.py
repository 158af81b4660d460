"""`python -m benchmarks.stream`: speed of the streaming step, with one slot or with many.

It prints the time to first audio, what a step costs as an answer grows, how many speakers are
served in real time, and which share of the roofline the parts of a step reach.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from benchmarks.stream_bench import Bench, engine_config_for
from benchmarks.stream_growth import compare
from omni2_jax.config import UNITS_PER_SECOND
from omni2_jax.console import run_function
from omni2_jax.generate import read_write, streaming_step
from omni2_jax.generate.read_write_state import ReadWriteOutput
from omni2_jax.generate.streaming_step import DecodeState

POINTS = (5, 20, 50, 100)  # steps whose times are reported
console = rich.console.Console()


Part = Callable[[dict, DecodeState], DecodeState]


def compile_parts(graph: nnx.GraphDef, bench: Bench) -> dict[str, Part]:
    """The parts of a step, each compiled by itself."""
    config, engine_config, dtype = bench.config, bench.engine_config, bench.engine.dtype
    slots = engine_config.slots
    tokens = jnp.zeros((slots, config.read), jnp.int32)
    hiddens = jnp.zeros((slots, config.read, config.llm.width), dtype)
    no = jnp.zeros(slots, bool)
    units = jnp.full((slots, config.write), config.tokens.sep + 1)
    output = ReadWriteOutput(tokens, units)

    def text(params: dict, state: DecodeState) -> DecodeState:
        language, *_ = read_write.read(nnx.merge(graph, params), state.language)
        return dataclasses.replace(state, language=language)

    def write(params: dict, state: DecodeState) -> DecodeState:
        model, units_only = nnx.merge(graph, params), engine_config.units_only
        language, _ = read_write.write(model, state.language, tokens, hiddens, no, units_only)
        return dataclasses.replace(state, language=language)

    def speak(params: dict, state: DecodeState) -> DecodeState:
        model = nnx.merge(graph, params)
        return streaming_step.speak_step(model, engine_config, state, output, no)[0]

    # With other shardings, the engine's programs would be compiled again.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, bench.engine.state)
    lowered = [
        jax.jit(part, donate_argnums=1, out_shardings=shardings).lower(
            bench.engine.params, bench.engine.state
        )
        for part in (text, write, speak)
    ]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda one: one.compile(), lowered)
        return dict(zip(("text", "units", "flow and vocoder"), compiled, strict=True))


def time_parts(graph: nnx.GraphDef, bench: Bench, parts: Mapping[str, Part]) -> dict[str, float]:
    """Milliseconds of the parts of a step, and of encoder and prefill."""
    config, params = bench.config, bench.engine.params
    milliseconds, streams = {}, bench.fill()
    for name, part in parts.items():
        milliseconds[name] = 1000 * time_part(bench, part)
    bench.empty(streams)

    encoder = config.speech_encoder
    mel = jnp.zeros((1, 2 * encoder.frames, encoder.mels), bench.engine.dtype)
    encode = jax.jit(lambda params, mel: nnx.merge(graph, params).encode_speech(mel))
    milliseconds["encoder"] = 1000 * device.seconds(lambda: encode(params, mel), 3)
    start = time.perf_counter()
    bench.empty(bench.fill())
    milliseconds["prefill"] = 1000 * (time.perf_counter() - start) / bench.engine_config.slots
    return milliseconds


def time_part(bench: Bench, part: Part) -> float:
    """Median seconds of one part of a step, which updates the engine's state."""
    state, times = bench.engine.state, []
    for _ in range(6):
        start = time.perf_counter()
        state = jax.block_until_ready(part(bench.engine.params, state))
        times.append(time.perf_counter() - start)
    bench.engine.state = state
    return statistics.median(times[1:])


def around(times: list[float], step: int) -> float:
    """Milliseconds of a step: the median of it and of its two neighbours on each side."""
    return 1000 * statistics.median(times[max(step - 3, 0) : step + 2])


def main(
    size: Annotated[
        str, typer.Option(help=f"Dimensions of random weights, one of {', '.join(SIZES)}.")
    ] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A converted checkpoint to measure instead.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Measure with 1, 2, 4 ... slots, up to so many.")
    ] = 1,
    slots: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Measure with so many slots instead (repeatable)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps of one answer (0.4 s each).")] = 100,
    chunk: Annotated[
        int | None,
        typer.Option(help="Units in a chunk of the flow. [default: the checkpoint's, 50]"),
    ] = None,
    left_chunks: Annotated[
        int | None, typer.Option(help="Chunks that the flow sees before its own. [default: all]")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Random matrices as int8, not those of a checkpoint.")
    ] = False,
    flow_cache_dtype: Annotated[
        str,
        typer.Option(
            help="dtype of the flow's KV cache: float32 or bfloat16; on a GPU that of the flow's "
            "estimator is always bfloat16."
        ),
    ] = "float32",
    parts: Annotated[
        bool, typer.Option(help="Measure the parts of a step, too; each is compiled by itself.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    ready: Annotated[
        Path | None,
        typer.Option(help="Create this file when all is compiled; measure after a line on stdin."),
    ] = None,
) -> None:
    """Measure the streaming step with random or converted weights.

    With more than one number of slots, all but the throughput is measured with the first.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config, graph, params = load(size, checkpoint, dtype, int8)

    def make_bench(count: int) -> Bench:
        engine_config = engine_config_for(
            config,
            count,
            steps,
            flow_chunk=chunk,
            flow_left_chunks=left_chunks,
            flow_cache_dtype=flow_cache_dtype,
        )
        return Bench(config, graph, params, engine_config)

    counts = slots or [2**power for power in range(batch.bit_length())]
    start = time.perf_counter()
    bench = make_bench(counts[0])
    compiled_parts = compile_parts(graph, bench) if parts else {}
    figures = {
        "device": jax.devices()[0].device_kind,
        "size": str(checkpoint or size),
        "dtype": dtype.__name__,
        "int8": int8,
        "slots": counts[0],
        "engine_config": dataclasses.asdict(bench.engine_config),
        "warm_up_s": time.perf_counter() - start,
    }
    device.wait_for_turn(ready)

    def of_speakers(times: list[float]) -> dict:
        return speakers(times, make_bench, counts, config.write / UNITS_PER_SECOND)

    for more in measurements(bench, graph, steps, of_speakers, compiled_parts):
        figures |= more
        if json_file:  # after each, so that a run that is cut off leaves some
            json_file.write_text(json.dumps(figures, indent=1) + "\n")
    report(figures)


def measurements(
    bench: Bench,
    graph: nnx.GraphDef,
    steps: int,
    of_speakers: Callable[[list[float]], dict],
    parts: Mapping[str, Part],
) -> Iterator[dict]:
    """All figures, the most telling first.

    of_speakers: seconds of the steps with the bench's slots -> the figures of `speakers`. parts:
    those of a step, which are measured, too.
    """
    speech = bench.config.write / UNITS_PER_SECOND
    compiled = bench.engine.compilations()
    times, dispatch = bench.answer(steps)
    median = statistics.median(times)
    step_ms = {str(step): around(times, step) for step in POINTS if step <= steps}
    yield {
        "rtf": median / speech,
        "step_ms": step_ms,
        "dispatch_share": dispatch / median,
        "first_audio_ms": 1000 * bench.first_audio(),
        "compilations": compiled,
        "compilations_during_answers": bench.engine.compilations() - compiled,
    }
    yield {"profile": profile(bench)}
    yield of_speakers(times)
    if not parts:
        return
    taken = time_parts(graph, bench, parts)
    yield {
        "encoder_ms": taken["encoder"],
        "prefill_ms": taken["prefill"],
        "text_token_ms": taken["text"] / bench.config.read,
        "unit_ms": taken["units"] / bench.config.write,
        "flow_vocoder_ms": taken["flow and vocoder"],
    }
    yield {"roofline": against_roofline(bench, taken)}
    measured = list(map(int, step_ms))
    yield {"growth": compare(bench, measured[0], measured[-1])}


def profile(bench: Bench, steps: int = 4) -> dict | None:
    """What the device did in the last of some steps (`device.traced`)."""
    streams = bench.fill()
    for _ in range(steps):
        bench.step()
    summary = device.traced(bench.step)
    bench.empty(streams)
    return summary


def speakers(
    times: list[float], make_bench: Callable[[int], Bench], counts: Sequence[int], speech: float
) -> dict:
    """Throughput with each of `counts` slots.

    times: seconds of the steps with the first of them, measured already. speech: seconds of speech
    in a step. realtime_speakers is the largest number of slots with which 95 % of the steps take no
    longer than their speech.
    """
    rates, realtime = {}, 0
    steps = min(30, len(times))  # no more than the buffers hold
    for slots in counts:
        if slots != counts[0]:
            times, _ = make_bench(slots).answer(steps)
        rates[str(slots)] = slots * speech / statistics.median(times)
        if np.percentile(times, 95) <= speech:
            realtime = slots
    return {"audio_s_per_s": rates, "realtime_speakers": realtime}


def against_roofline(bench: Bench, parts: dict[str, float]) -> dict:
    """The bandwidth and FLOP rate of the device, and for each part of a step what they allow.

    parts: measured milliseconds of each part.
    """
    bandwidth = device.copy_bandwidth()
    rate, decoder_rate = device.matmul_rate(bench.engine.dtype), device.matmul_rate(jnp.float32)
    work = roofline.step(bench.config, bench.engine.params, bench.engine_config)
    figures: dict = {
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": rate,
        "matmul_float32_flops_per_s": decoder_rate,
    }
    for name, stages, flop_rate in (
        ("text", ("text",), rate),
        ("units", ("units",), rate),
        ("flow and vocoder", ("flow", "vocoder"), decoder_rate),
    ):
        works = [work[stage] for stage in stages]
        bound = 1000 * sum(work.least_seconds(bandwidth, flop_rate) for work in works)
        figures[name] = {
            "bytes": sum(work.bytes for work in works),
            "flops": sum(work.flops for work in works),
            "least_ms": bound,
            "ms": parts[name],
            "fraction": bound / parts[name],
        }
    return figures


def report(figures: dict) -> None:
    """Print the figures as tables."""
    title = f"{figures['size']}, {figures['dtype']}, {figures['device']}"
    table = rich.table.Table(show_header=False, title=title)
    for row in rows(figures):
        table.add_row(*row)
    console.print(table)
    if "roofline" in figures:
        report_roofline(figures["roofline"])
    if summary := figures["profile"]:
        console.print(
            f"{summary['kernels']} kernels and copies in a step of {1000 * summary['seconds']:.1f} "
            f"ms with the profiler; the device was busy {100 * summary['busy']:.0f} % of it"
        )
        table = rich.table.Table("kernels that took most", "ms", "times")
        for name, seconds, times in summary["largest"]:
            table.add_row(name, f"{1000 * seconds:.2f}", str(times))
        console.print(table)


def rows(figures: dict) -> Iterator[tuple[str, str]]:
    """The rows of the first table."""
    steps = ", ".join(f"{step}: {ms:.0f} ms" for step, ms in figures["step_ms"].items())
    rates = ", ".join(f"{n}: {rate:.2f}" for n, rate in figures["audio_s_per_s"].items())
    yield "slots", str(figures["slots"])
    yield "compiling", f"{figures['warm_up_s']:.0f} s"
    yield (
        "time to first audio (features on the device)",
        f"{figures['first_audio_ms']:.0f} ms",
    )
    yield "real-time factor of a speaker", f"{figures['rtf']:.3f}"
    yield "step number", steps
    yield "Python's share of a step", f"{100 * figures['dispatch_share']:.1f} %"
    compiled = figures["compilations"], figures["compilations_during_answers"]
    yield "compilations (warm-up, answers)", ", ".join(map(str, compiled))
    yield "audio seconds per second, by slots", rates
    yield "speakers in real time (p95)", str(figures["realtime_speakers"])
    if "roofline" not in figures:
        return
    yield "encoder and adapter, 30 s", f"{figures['encoder_ms']:.0f} ms"
    yield "prefill of a turn", f"{figures['prefill_ms']:.0f} ms"
    yield "a text token", f"{figures['text_token_ms']:.2f} ms"
    yield "a unit", f"{figures['unit_ms']:.2f} ms"
    yield "flow and vocoder, a step", f"{figures['flow_vocoder_ms']:.0f} ms"
    growth = figures["growth"]
    yield (
        f"growth, step {growth['from']} to {growth['to']}",
        f"measured {growth['measured']:.2f}, by attention alone {growth['predicted']:.2f}",
    )


def report_roofline(figures: dict) -> None:
    """Print what the parts of a step take beside what the device allows."""
    table = rich.table.Table(
        "part of a step", "MB moved", "GFLOP", "at best, ms", "measured, ms", "of the roofline"
    )
    for name in ("text", "units", "flow and vocoder"):
        part = figures[name]
        numbers = part["bytes"] / 1e6, part["flops"] / 1e9, part["least_ms"], part["ms"]
        table.add_row(name, *(f"{n:.1f}" for n in numbers), f"{100 * part['fraction']:.0f} %")
    console.print(table)
    copied, multiplied = figures["copy_bytes_per_s"] / 1e9, figures["matmul_flops_per_s"] / 1e12
    rates = f"copy {copied:.1f} GB/s, matmul {multiplied:.2f} TFLOP/s, measured in this run"
    console.print(rates, highlight=False)


if __name__ == "__main__":
    run_function(main)

"""`python -m benchmarks.vs_torch`: our speech LM and speech encoder beside PyTorch's.

Both have the same dimensions and run on the same device in one run. The speech LM makes writes of W
units, each after R fused rows (40 writes are 16 s of speech): ours with its cache, transformers'
Qwen2 with its cache, and transformers' Qwen2 that prefills the whole context again for every write,
as the released code does.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import torch
import transformers
import typer
from flax import nnx
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks.sizes import load
from omni2_jax.config import Omni2Config, SpeechEncoderConfig
from omni2_jax.console import run_function
from omni2_jax.convert.families import qwen2
from omni2_jax.generate import read_write
from omni2_jax.generate.read_write_state import READING, ReadWriteState
from omni2_jax.models.model import language_dtype


def best(run: Callable[[], float], repeats: int) -> float:
    return min(run() for _ in range(repeats))


def ours(
    config: Omni2Config,
    graph: nnx.GraphDef,
    params: dict,
    writes: int,
    units_only: bool,
    repeats: int,
) -> float:
    """Seconds of gate fusion and speech LM for all writes."""
    rows = jnp.zeros((1, config.read, config.llm.width), language_dtype(params))
    tokens = jnp.zeros((1, config.read), jnp.int32)
    capacity = writes * (config.read + config.write) + 1

    @jax.jit
    def fresh() -> ReadWriteState:
        state = ReadWriteState.empty(config, 1, 1, capacity, rows.dtype)
        return dataclasses.replace(state, phase=jnp.full(1, READING))

    def write(params: dict, state: ReadWriteState) -> tuple[ReadWriteState, jax.Array]:
        return read_write.write(
            nnx.merge(graph, params), state, tokens, rows, jnp.array([False]), units_only
        )

    run_write = jax.jit(write, donate_argnums=1)

    def run(count: int) -> float:
        state = jax.block_until_ready(fresh())
        start = time.perf_counter()
        for _ in range(count):
            state, speech = run_write(params, state)
        jax.block_until_ready(speech)
        return time.perf_counter() - start

    run(1)
    return best(lambda: run(writes), repeats)


@torch.inference_mode()
def theirs(config: Omni2Config, writes: int, cached: bool, repeats: int) -> float:
    """Seconds of transformers' Qwen2 for the same writes.

    cached: one cache for all writes, or else a new prefill of the whole context for each.
    """
    lm = config.speech_lm
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**qwen2.write_config(lm), eos_token_id=config.tokens.unit_eos)
    ).eval()
    embed, rows = model.get_input_embeddings(), torch.zeros(1, config.read, lm.width)

    def token(hidden: torch.Tensor) -> torch.Tensor:
        likeliest = torch.topk(model.lm_head(hidden[:, -1]), 50)
        choice = torch.multinomial(likeliest.values.softmax(-1), 1)
        return embed(likeliest.indices.gather(1, choice))

    def run(count: int) -> float:
        cache, context, fresh = transformers.DynamicCache(), rows[:, :0], rows
        start = time.perf_counter()
        for _ in range(count):
            if not cached:
                cache, context = transformers.DynamicCache(), torch.cat([context, fresh], 1)
            inputs = fresh if cached else context
            for _ in range(config.write):
                fresh = token(
                    model.model(
                        inputs_embeds=inputs, past_key_values=cache, use_cache=True
                    ).last_hidden_state
                )
                inputs = fresh
                context = context if cached else torch.cat([context, fresh], 1)
            fresh = torch.cat([fresh, rows], 1) if cached else rows
        return time.perf_counter() - start

    run(1)
    return best(lambda: run(writes), repeats)


def encoder_ours(
    graph: nnx.GraphDef, params: dict, config: SpeechEncoderConfig, repeats: int
) -> float:
    mel = jnp.zeros((1, 2 * config.frames, config.mels), language_dtype(params))
    encode = jax.jit(lambda params, mel: nnx.merge(graph, params).speech_encoder(mel))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(encode(params, mel))
        return time.perf_counter() - start

    run()
    return best(run, repeats)


@torch.inference_mode()
def encoder_theirs(config: SpeechEncoderConfig, repeats: int) -> float:
    dims: dict[str, Any] = {
        "num_mel_bins": config.mels,
        "max_source_positions": config.frames,
        "d_model": config.width,
        "encoder_layers": config.layers,
    }
    settings = transformers.WhisperConfig(
        **dims, encoder_attention_heads=config.heads, encoder_ffn_dim=4 * config.width
    )
    encoder = WhisperEncoder(settings).eval()
    mel = torch.zeros(1, config.mels, 2 * config.frames)

    def run() -> float:
        start = time.perf_counter()
        encoder(mel)
        return time.perf_counter() - start

    run()
    return best(run, repeats)


def main(
    size: Annotated[
        str, typer.Option(help="tiny or 0.5b: dimensions with random weights.")
    ] = "tiny",
    writes: Annotated[int, typer.Option(help="Writes of W units; 40 are 16 s of speech.")] = 40,
    repeats: Annotated[int, typer.Option(help="Runs of each, the best of which counts.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Time our speech LM and speech encoder against PyTorch's in float32 on the CPU."""
    console = rich.console.Console()
    config, graph, params = load(size, None, jnp.float32)
    tokens = writes * config.write
    figures = {
        "device": f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} torch threads",
        "size": size,
        "writes": writes,
    }
    measured = {
        "ours_s": lambda: ours(config, graph, params, writes, True, repeats),
        "torch_cached_s": lambda: theirs(config, writes, True, repeats),
        "torch_reprefill_s": lambda: theirs(config, writes, False, 1),
        "ours_all_tokens_s": lambda: ours(config, graph, params, writes, False, repeats),
        "encoder_ours_s": lambda: encoder_ours(graph, params, config.speech_encoder, repeats),
        "encoder_torch_s": lambda: encoder_theirs(config.speech_encoder, repeats),
    }
    for name, measure in measured.items():
        with console.status(f"measuring {name}"):
            figures[name] = measure()
        console.print(f"{name} {figures[name]:.2f}", highlight=False)
        if json_file:
            json_file.write_text(json.dumps(figures, indent=1) + "\n")
    table = rich.table.Table(
        "what",
        "seconds",
        "ms a unit",
        "of ours",
        title=f"{size}, float32, {writes} writes, {figures['device']}",
    )
    for name, label in {
        "ours_s": "speech LM, ours (only units can be sampled)",
        "ours_all_tokens_s": "speech LM, ours (any token)",
        "torch_cached_s": "speech LM, PyTorch with its cache",
        "torch_reprefill_s": "speech LM, PyTorch, prefill for every write (as released)",
    }.items():
        value = figures[name]
        table.add_row(
            label,
            f"{value:.2f}",
            f"{1000 * value / tokens:.1f}",
            f"{value / figures['ours_s']:.2f}",
        )
    table.add_section()
    for name, label in {
        "encoder_ours_s": "speech encoder, ours, 30 s",
        "encoder_torch_s": "speech encoder, PyTorch",
    }.items():
        table.add_row(
            label, f"{figures[name]:.2f}", "", f"{figures[name] / figures['encoder_ours_s']:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    run_function(main)

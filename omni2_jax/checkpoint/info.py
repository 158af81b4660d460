"""What a checkpoint holds, read from its metadata alone."""

import math
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.checkpoint import parameters, voices
from omni2_jax.config import Omni2Config
from omni2_jax.models import speech_tokenizer


@dataclass(frozen=True)
class Part:
    """A part's dimensions in words, its parameter count, the types it is stored in, its bytes."""

    name: str
    dimensions: str
    parameters: int
    dtype: str
    bytes: int


def parts(directory: Path) -> list[Part]:
    """Every part of a checkpoint, in the order of the data's path. Raises ValueError when it is none or damaged."""
    config = Omni2Config.load(directory / "config.json")
    names = parameters.parts(directory)
    joined = {"adapter": ("speech_encoder", "llm"), "fusion": ("llm", "speech_lm")}
    needed = dict.fromkeys(part for name in names for part in (name, *joined.get(name, ())))
    config.need(directory / "config.json", *needed)
    return [part(directory, config, name) for name in names]


def part(directory: Path, config: Omni2Config, name: str) -> Part:
    stored = parameters.metadata(directory, name).values()
    counts = [math.prod(leaf.shape) for leaf in stored]
    size = sum(count * leaf.dtype.itemsize for count, leaf in zip(counts, stored, strict=True))
    dimensioned = (
        describe_speech_tokenizer(directory)
        if name == "speech_tokenizer"
        else dimensions(config, name)
    )
    return Part(
        name,
        dimensioned,
        sum(counts),
        ", ".join(sorted({leaf.dtype.name for leaf in stored})),
        size,
    )


def dimensions(config: Omni2Config, name: str) -> str:
    c = getattr(config, name, None)
    if name in ("llm", "speech_lm"):
        return f"decoder: {c.layers} layers, width {c.width}, {c.heads} heads ({c.kv_heads} kv), vocabulary {c.vocabulary}"
    if name == "speech_encoder":
        return f"Whisper: {c.layers} layers, width {c.width}, {c.heads} heads"
    if name == "adapter":
        return f"{c.stride} frames to one position, {config.speech_encoder.width} -> {config.llm.width}"
    if name == "fusion":
        return f"gate, {config.llm.width} -> {config.speech_lm.width}"
    if name == "flow":
        return f"width {c.width}, {c.layers} + {c.up_layers} layers, {c.mid_blocks} middle blocks, chunk {c.chunk} units"
    if name == "vocoder":
        return f"{c.channels} channels, {c.harmonics} harmonics, {c.sample_rate} Hz"
    return f"CAM++: layers {c.layers}, x-vector {c.embedding}"


def describe_speech_tokenizer(directory: Path) -> str:
    c = speech_tokenizer.load_config(directory)
    return f"speech tokenizer: {c.layers} layers, width {c.width}, {c.units} units"


def facts(directory: Path) -> dict[str, str]:
    """The rest that a user asks for."""
    config = Omni2Config.load(directory / "config.json")
    found = {}
    if config.speech_lm:
        found["read/write"] = (
            f"R = {config.read} text tokens, W = {config.write} units ({config.units} of them)"
        )
    if config.llm:
        found["prompt"] = f"at most {config.max_prompt} positions"
        found["text ends at"] = ", ".join(map(str, config.tokens.text_eos))
    found["voices"] = ", ".join(voices.names(directory)) or "none"
    return found

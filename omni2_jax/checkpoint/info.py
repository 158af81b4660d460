"""What a checkpoint holds, read from its metadata alone."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni2_jax.checkpoint import checksums, parameters, voices
from omni2_jax.config import DecoderConfig, Omni2Config
from omni2_jax.models import speech_tokenizer


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint.

    dimensions: in words. parameters: their number. dtype: the types they are stored in. bytes: in
    memory, in these types. checksums: whether all arrays have them.
    """

    name: str
    dimensions: str
    parameters: int
    dtype: str
    bytes: int
    checksums: bool


def parts(directory: Path) -> list[Part]:
    """Every part of a checkpoint, in the order of the data's path.

    Raises ValueError if the directory is no checkpoint, or is damaged.
    """
    config = Omni2Config.load(directory / "config.json")
    names = parameters.parts(directory)
    joined = {"adapter": ("speech_encoder", "llm"), "fusion": ("llm", "speech_lm")}
    needed = dict.fromkeys(part for name in names for part in (name, *joined.get(name, ())))
    config.need(directory / "config.json", *needed)
    return [part(directory, config, name) for name in names]


def part(directory: Path, config: Omni2Config, name: str) -> Part:
    """One part of a checkpoint. Raises ValueError if its files are damaged."""
    arrays = parameters.metadata(directory, name).values()
    dtypes = [np.dtype(array.dtype) for array in arrays]
    counts = [math.prod(array.shape) for array in arrays]
    return Part(
        name=name,
        dimensions=dimensions(directory, config, name),
        parameters=sum(counts),
        dtype=", ".join(sorted({dtype.name for dtype in dtypes})),
        bytes=sum(count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)),
        checksums=all(checksums.has_checksums(array) for array in arrays),
    )


def dimensions(directory: Path, config: Omni2Config, name: str) -> str:
    """The sizes of a part in words."""
    if name == "speech_tokenizer":
        c = speech_tokenizer.load_config(directory)
        return f"{c.layers} layers, width {c.width}, {c.units} units"
    if name == "fusion":  # its sizes are those of its neighbours
        mix = "unused" if config.mix == "text" else config.mix
        return f"{mix}, {width(config, 'llm', 'speech_lm')}"
    c = getattr(config, name)
    if c is None:
        return "not described by config.json"
    if isinstance(c, DecoderConfig):
        family = "Qwen3" if c.qk_norm else "Qwen2"
        return (
            f"{family}: {c.layers} layers, width {c.width}, {c.heads} heads ({c.kv_heads} kv), "
            f"vocabulary {c.vocabulary}"
        )
    if name == "speech_encoder":
        return f"Whisper: {c.layers} layers, width {c.width}, {c.heads} heads"
    if name == "adapter":
        return f"{c.stride} frames to one position, {width(config, 'speech_encoder', 'llm')}"
    if name == "flow":
        return (
            f"width {c.width}, {c.layers} + {c.up_layers} layers, {c.mid_blocks} middle blocks, "
            f"chunk {c.chunk} units"
        )
    if name == "vocoder":
        return f"{c.channels} channels, {c.harmonics} harmonics, {c.sample_rate} Hz"
    return f"CAM++: layers {c.layers}, x-vector {c.embedding}"


def width(config: Omni2Config, *names: str) -> str:
    """The widths of two parts, "1280 -> 896"; "?" for a part that config.json does not describe."""
    described = [getattr(config, name) for name in names]
    return " -> ".join(str(part.width) if part else "?" for part in described)


def about(directory: Path) -> str:
    """What a checkpoint says of itself: the first paragraph of its README.md, in one line."""
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return next((part for part in paragraphs if part and not part.startswith("#")), "")


def facts(directory: Path) -> dict[str, str]:
    """Rules, limits and voices of a checkpoint, by name."""
    config = Omni2Config.load(directory / "config.json")
    lines = {}
    if config.speech_lm:
        lines["read/write"] = (
            f"R = {config.read} text tokens, W = {config.write} units ({config.units} of them)"
        )
    if config.llm:
        lines["prompt"] = f"at most {config.max_prompt} positions"
        lines["text ends at"] = ", ".join(map(str, config.tokens.text_eos))
    has_one = config.flow and config.flow.speaker == 1
    names = ["one, without a name"] if has_one else voices.names(directory)
    lines["voices"] = ", ".join(names) or "none"
    return lines

"""Floating-point operations of a training step, counted from shapes: XLA's own count takes a scan
for one of its iterations.

They are model FLOPs: those of the matmuls and convolutions that a step needs, not of what is
recomputed to save memory.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from omni2_jax.config import DecoderConfig, Omni2Config
from omni2_jax.train.settings import Bucket

if TYPE_CHECKING:
    from omni2_jax.train.stages.base import Stage

Shapes = Mapping[str, jax.ShapeDtypeStruct]

MATRICES = ("kernel", "low", "high", "position", "table")  # names of parameters that multiply
# Matrices whose input comes from frozen parts, so that no gradient goes back through them.
NO_INPUT_GRADIENT = ("adapter.up.kernel", "fusion.up.kernel")


def step(stage: "Stage", config: Omni2Config, shapes: Shapes, bucket: Bucket) -> float:
    """FLOPs of a step with one batch, backward pass included; 0 if they are not known."""
    return sum(both for _, both in stage.flops(config, shapes, bucket).values())


def count(
    stage: "Stage", config: Omni2Config, shapes: Shapes, bucket: Bucket
) -> dict[str, tuple[float, float]]:
    """FLOPs of one batch by part: (forward pass, forward and backward pass).

    A matrix costs 2 FLOPs for every weight and every position of its input; as much again if a
    gradient goes back through it, and once more if it is trained. The speaker encoder is small and
    frozen, and is not counted.
    """
    flops: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(part: str, forward: float, passes: int) -> None:
        flops[part][0] += stage.train.batch * forward
        flops[part][1] += stage.train.batch * forward * passes

    for part, forward, passes in attention(config, bucket):
        if part in stage.loaded:
            add(part, forward, passes if part in stage.trained else 1)
    for path, shape in shapes.items():
        part, *_, name = path.split(".")
        if name not in MATRICES or part not in stage.loaded:
            continue
        passes = 1
        if part in stage.trained:
            passes += (path not in NO_INPUT_GRADIENT) + stage.is_trained(path)
        add(part, 2 * math.prod(shape.shape) * inputs(stage, config, path, bucket), passes)
    return {part: (forward, both) for part, (forward, both) in flops.items()}


def inputs(stage: "Stage", config: Omni2Config, path: str, bucket: Bucket) -> int:
    """The number of positions in a row that a matrix is multiplied with."""
    part, *names = path.split(".")
    segments = max(bucket.segments, 1)
    frames = config.speech_encoder.frames if config.speech_encoder else 0
    match part:
        case "speech_encoder":
            return segments * frames * (2 if names[0] == "conv1" else 1)
        case "adapter" if config.adapter:
            return segments * config.speech_positions
        case "fusion":
            return segments * bucket.tokens
        case "llm" if config.llm:
            return bucket.positions * is_used(config.llm, names, part in stage.scored)
        case "speech_lm" if config.speech_lm:
            return segments * bucket.tokens * is_used(config.speech_lm, names, part in stage.scored)
        case "flow" if config.flow:
            # A table is looked up, and the embeddings of speaker and time are computed once a
            # reply.
            if names[0] in ("embed", "speaker") or "time" in names:
                return 0
            at_unit_rate = names[0] == "encoder" and not names[1].startswith("up")
            return bucket.tokens * (1 if at_unit_rate else config.flow.upsample)
    return 0


def is_used(config: DecoderConfig, names: list[str], scored: bool) -> bool:
    """Whether a matrix is used: those of layers are, the output matrix if logits are scored."""
    output = "embedding" if config.tied else "head"
    return names[0] == "layers" or (scored and names[0] == output)


def attention(config: Omni2Config, bucket: Bucket) -> Iterator[tuple[str, float, int]]:
    """Of scores and weighted sums: (part, FLOPs of a row's forward pass, passes in training).

    A position of a language model sees half of the other positions on average.
    """
    segments = max(bucket.segments, 1)
    if c := config.speech_encoder:
        yield "speech_encoder", 4 * bucket.segments * c.layers * c.width * c.frames**2, 3
    if c := config.llm:
        yield "llm", 4 * c.layers * c.heads * c.head_size * bucket.positions**2 / 2, 3
    if c := config.speech_lm:
        heads = c.heads * c.head_size
        yield "speech_lm", 4 * segments * c.layers * heads * bucket.tokens**2 / 2, 3
    if c := config.flow:
        units, frames = bucket.tokens, c.upsample * bucket.tokens
        pairs = c.layers * units**2 + c.up_layers * frames**2
        blocks = (2 + c.mid_blocks) * c.blocks
        estimator = blocks * c.estimator_heads * c.estimator_head_size * frames**2
        yield "flow", 4 * (c.width * pairs + estimator), 3
        # Queries against relative positions, which are constants.
        yield "flow", 2 * c.heads * c.width * pairs, 2

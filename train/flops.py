"""How many floating-point operations a step takes, counted from shapes: a scan hides its repetitions from XLA's own count.

They are model FLOPs: those of the matmuls and convolutions a step needs, not of what is computed twice to save memory.
"""

import math
from collections.abc import Mapping

import jax

from omni2_jax.config import Omni2Config
from omni2_jax.train import stages
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages import STAGES, is_trained

# bf16, dense, of one device, by the start of its name; the first that fits. Sources: the vendors' data sheets.
PEAK = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
MATRICES = ("kernel", "low", "high", "position", "table")  # the names of what is multiplied with
NO_INPUT_GRADIENT = (
    "adapter.up.kernel",
    "fusion.up.kernel",
)  # what goes into these comes from frozen parts: no gradient goes back


def peak(device: jax.Device) -> float | None:
    """What the device can do in a second, None if it is not known."""
    return next(
        (flops for name, flops in PEAK.items() if device.device_kind.startswith(name)), None
    )


def step(
    train: TrainConfig,
    config: Omni2Config,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    bucket: Bucket,
) -> float:
    """Of one batch."""
    return sum(both for _, both in parts(train, config, shapes, bucket).values())


def parts(
    train: TrainConfig,
    config: Omni2Config,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    bucket: Bucket,
) -> dict[str, tuple[float, float]]:
    """Of one batch by part: (forward pass, forward and backward pass). The speaker encoder is small, frozen and left out.

    A weight costs 2 for every row that passes it; as much again if a gradient goes back through it, and once more if it is trained.
    """
    found: dict[str, tuple[float, float]] = {}

    def add(part: str, flops: float, times: int) -> None:
        forward, both = found.get(part, (0, 0))
        found[part] = forward + train.batch * flops, both + train.batch * flops * times

    for part, flops, times in attention(config, bucket):
        if part in stages.parts(train):
            add(part, flops, times if part in STAGES[train.stage].trained else 1)
    for path, shape in shapes.items():
        part, *_, name = path.split(".")
        if name in MATRICES and part in stages.parts(train) and part != "speaker":
            times = (
                1
                if part not in STAGES[train.stage].trained
                else 1 + (path not in NO_INPUT_GRADIENT) + is_trained(train, path)
            )
            add(part, 2 * math.prod(shape.shape) * rows(train, config, path, bucket), times)
    return found


def rows(train: TrainConfig, config: Omni2Config, path: str, bucket: Bucket) -> int:
    """How many rows of a batch's row pass a matrix."""
    part, *names = path.split(".")
    clips, frames = (
        max(bucket.clips, 1),
        config.speech_encoder.frames if config.speech_encoder else 0,
    )
    match part:
        case "speech_encoder":
            return clips * frames * (2 if names[0] == "conv1" else 1)
        case "adapter":
            return clips * (frames // config.adapter.stride)
        case "fusion":
            return clips * bucket.tokens
        case "llm":
            return (
                bucket.positions
                if is_used(config.llm.tied, names, speaks=train.stage == "1a")
                else 0
            )
        case "speech_lm":
            return (
                clips * bucket.tokens if is_used(config.speech_lm.tied, names, speaks=True) else 0
            )
    if names[0] in ("embed", "speaker") or "time" in names:
        return 0  # a table that is looked up, and what is computed once a recording
    return bucket.tokens * (
        1 if names[0] == "encoder" and not names[1].startswith("up") else config.flow.upsample
    )


def is_used(tied: bool, names: list[str], speaks: bool) -> bool:
    """Whether a language model multiplies with a matrix: always with those of its layers, with its head if its logits are wanted."""
    return names[0] == "layers" or (speaks and names[0] == ("embedding" if tied else "head"))


def attention(config: Omni2Config, bucket: Bucket) -> list[tuple[str, float, int]]:
    """Scores and the sums of values that they weigh: (part, FLOPs of a row's forward pass, times as many with a backward pass).

    A row of a language model sees half of the others on average.
    """
    clips, found = max(bucket.clips, 1), []
    if c := config.speech_encoder:
        found.append(("speech_encoder", 4 * bucket.clips * c.layers * c.width * c.frames**2, 3))
    if c := config.llm:
        found.append(("llm", 4 * c.layers * c.heads * c.head_size * bucket.positions**2 / 2, 3))
    if c := config.speech_lm:
        found.append(
            ("speech_lm", 4 * clips * c.layers * c.heads * c.head_size * bucket.tokens**2 / 2, 3)
        )
    if c := config.flow:
        units, frames = bucket.tokens, c.upsample * bucket.tokens
        pairs = c.layers * units**2 + c.up_layers * frames**2
        estimator = (
            (2 + c.mid_blocks) * c.blocks * c.estimator_heads * c.estimator_head_size * frames**2
        )
        found.append(("flow", 4 * (c.width * pairs + estimator), 3))
        found.append(
            ("flow", 2 * c.heads * c.width * pairs, 2)
        )  # queries against positions, which are constants
    return found

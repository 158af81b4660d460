"""How many floating-point operations a step takes, counted from shapes: a scan hides its repetitions from XLA's own count."""

import math
from collections.abc import Mapping

import jax

from omni2_jax.config import Omni2Config, Qwen2Config
from train.config import Bucket, Train
from train.stages import STAGES

# bf16, dense, of one device, by the start of its name. Sources: the vendors' data sheets.
PEAK = {
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


def peak(device: jax.Device) -> float | None:
    """What the device can do in a second, None if it is not known."""
    return next((flops for name, flops in PEAK.items() if device.device_kind.startswith(name)), None)


def step(train: Train, config: Omni2Config, shapes: Mapping[str, jax.ShapeDtypeStruct], bucket: Bucket) -> float:
    """Of one batch: 2 for each weight a row passes in the forward pass, 4 more backwards where something below is trained (a weight
    that is frozen but lies on the way back costs 2). What is computed twice to save memory is not counted: model FLOPs."""
    trained, kernels = STAGES[train.stage].trained, (".kernel", ".low", ".high")

    def weights(part: str) -> int:
        return sum(math.prod(shape.shape) for path, shape in shapes.items() if path.startswith(f"{part}.") and path.endswith(kernels))

    def passes(part: str) -> int:
        """Forward and, where it is trained, backward for its input and for its weights."""
        return 1 if part not in trained else 2 if train.rank and part == "llm" else 3

    rows, clips = train.batch, max(bucket.clips, 1)
    passed = {}
    if bucket.clips:
        frames = config.speech_encoder.frames
        passed["speech_encoder"] = 2 * weights("speech_encoder") * frames + attention(config.speech_encoder, frames)
        passed["speech_encoder"] *= clips
        passed["adapter"] = 2 * weights("adapter") * clips * frames // config.adapter.stride
        passed["llm"] = language(config.llm, weights("llm"), bucket.positions, head=train.stage == "1a")
    if train.stage in ("1b", "2"):
        passed["speech_lm"] = clips * language(config.speech_lm, weights("speech_lm"), bucket.tokens, head=True)
    if train.stage == "2":
        passed["fusion"] = 2 * weights("fusion") * clips * bucket.tokens
    if train.stage == "flow":
        frames = config.flow.upsample * bucket.tokens
        passed["flow"] = 2 * weights("flow") * frames
    return rows * sum(flops * passes(part) for part, flops in passed.items())


def language(config: Qwen2Config, kernels: int, time: int, head: bool) -> float:
    tied = config.vocabulary * config.width if config.tied and head else 0
    untied = 0 if config.tied or head else config.vocabulary * config.width  # a head that is there but not used
    return 2 * (kernels + tied - untied) * time + attention(config, time) / 2  # a row sees half of the others


def attention(config, time: int) -> float:
    """Scores and their values, over all rows."""
    return 4 * config.layers * time * time * config.width

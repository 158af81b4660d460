"""The parts of a job as a compiled program names them, and the fewest bytes that each can move.

B slots, R text tokens and W units of a step, w bytes of a number.

- text_token, unit: the weights of the layers and of the head's rows once; of the live positions of
  every slot the keys and values once, 2 x layers x kv_heads x head_size x w each; those of the new
  position written; the float32 logits written.
- fused_rows (the speech LM reads R fused tokens and samples the first unit): the same, with R + 2
  new positions.
- sampling: the float32 logits read once.
- encoder, of one pass of the flow: its weights, its cache of the past read once, the new keys and
  values written, units in, features out.
- euler_step: the estimator's weights, the cache of both guidance branches read once, the new keys
  and values written, mel and conditions in, mel out.
- vocoder: its weights, the mel in, the samples out.
- prefill: weights once, new keys and values written, the embedded prompt read.
- train: parameters, read in the forward and in the backward pass of each microbatch, a float32
  gradient of each written and read, and the optimizer's state, the parameters among it, read and
  written once. Activations are not counted: what of them is kept is a matter of memory.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks import roofline
from omni2_jax.config import DecoderConfig, Omni2Config
from omni2_jax.generate import streaming_step
from omni2_jax.generate.engine_config import EngineConfig

SCOPES = ("text_token", "fused_rows", "unit", "sampling", "encoder", "euler_step", "vocoder")


@dataclass(frozen=True)
class Part:
    """How often a part runs, and the fewest bytes that it can move each time."""

    passes: float  # in a step, on average
    least: float  # bytes of one pass
    counted: int = 1  # passes that the text of the program holds: all Euler steps of a mel


def label(op_name: str) -> str | None:
    """The part of an instruction of a step: the last named scopes that it was traced in."""
    scopes = [name for name in op_name.split("/") if name in SCOPES or name.startswith("flow_")]
    if not scopes:
        return None
    nested = scopes[-1] == "sampling" or scopes[0].startswith("flow_")
    return "/".join(scopes[-2:] if nested else scopes[-1:])


def iterations(op_name: str, live: int) -> int | None:
    """How often a loop runs in a step with so many live positions: once or not at all.

    The positions that it is for are in the name of its scope (`kv_cache.over_live`); None if it is
    another loop or a conditional.
    """
    match = re.search(r"/live_(\d+)_to_(\d+)/while$", op_name)
    return None if match is None else int(int(match[1]) <= live <= int(match[2]))


def training_label(op_name: str) -> str | None:
    """The part of an instruction of a training step: JAX names what it differentiates."""
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else None


def of_step(
    config: Omni2Config, params: dict, engine_config: EngineConfig, live: int
) -> dict[str, Part]:
    """The parts of a step of all slots, with `live` positions in both language models' caches."""
    slots, c = engine_config.slots, config.flow
    vocabulary, units = config.llm.vocabulary, config.units + 1

    def language(lm: DecoderConfig, part: str, head: int, rows: int) -> float:
        width = params[part]["norm"]["scale"].dtype.itemsize
        written = 2 * lm.layers * lm.kv_heads * lm.head_size * rows * slots * width
        read = roofline.decoder_pass(lm, params[part], head, slots, live).bytes
        return read + written + 4 * head * slots

    unit, rows = (language(config.speech_lm, "speech_lm", units, n) for n in (1, config.read + 2))
    parts = {
        "text_token": Part(config.read, language(config.llm, "llm", vocabulary, 1)),
        "text_token/sampling": Part(config.read, 4 * vocabulary * slots),
        "fused_rows": Part(1, rows),
        "fused_rows/sampling": Part(1, 4 * units * slots),
        "unit": Part(config.write - 1, unit),
        "unit/sampling": Part(config.write - 1, 4 * units * slots),
    }
    plan = streaming_step.plan_of(config, engine_config)
    passes = roofline.usual_windows(plan)
    for window in plan.window_buckets:
        often = passes.get(window, 0)
        encoder, euler_step = flow_pass(config, params["flow"], engine_config, window)
        parts[f"flow_{window}/encoder"] = Part(often, encoder)
        parts[f"flow_{window}/euler_step"] = Part(often * c.steps, euler_step, c.steps)
        parts[f"flow_{window}"] = Part(often, 0)
    frames = c.upsample * (config.write + c.lookahead)
    samples = streaming_step.samples_per_step(config)
    vocoder = roofline.size(params["vocoder"]) + 4 * slots * (frames * c.mels + samples)
    return parts | {"vocoder": Part(1, vocoder), "other": Part(1, 0)}


def flow_pass(
    config: Omni2Config, params: dict, engine_config: EngineConfig, window: int
) -> tuple[float, float]:
    """Fewest bytes of the encoder, and of one Euler step, for `window` units of every slot."""
    c, slots = config.flow, engine_config.slots
    number = jnp.dtype(engine_config.flow_cache_dtype).itemsize
    past = roofline.past_units(config, engine_config)
    frames = c.upsample * window
    encoder = (
        2 * c.width * (c.layers * (past + window) + c.up_layers * c.upsample * (past + window))
    )
    width = (2 + c.mid_blocks) * c.blocks * c.estimator_heads * c.estimator_head_size
    estimator = 2 * 2 * width * (c.upsample * past + frames)  # of both guidance branches
    features = 4 * slots * (c.width * window + c.mels * frames)
    mel = 4 * slots * frames * 5 * c.mels  # x, its three conditions, and the new x
    weights = [roofline.size(params[part]) for part in ("encoder", "project", "estimator")]
    blocks = jax.tree.leaves(params["estimator"]["down"]["blocks"])
    kept = min(number, *(leaf.dtype.itemsize for leaf in blocks))  # `Estimator.empty_cache`
    return (
        weights[0] + weights[1] + slots * number * encoder + features,
        weights[2] + slots * kept * estimator + mel,
    )


def of_prefill(config: Omni2Config, params: dict, engine_config: EngineConfig) -> dict[str, Part]:
    """A piece of a prompt into an empty cache."""
    lm, size = config.llm, engine_config.prefill_size
    work = roofline.decoder_pass(lm, params["llm"], 0, 1, size)
    width = params["llm"]["norm"]["scale"].dtype.itemsize
    return {"prefill": Part(1, work.bytes + lm.width * size * width)}


def of_training(kinds: dict, microbatches: int) -> dict[str, Part]:
    """A training step. kinds: the job's trees of shapes, as `aot.training` names them."""
    trained, frozen = (
        roofline.size(kinds[f"parameters, {kind}"]) for kind in ("trained", "frozen")
    )
    state = trained + roofline.size(kinds["optimizer"])
    batch = roofline.size(kinds["batch"])
    return {
        "forward": Part(1, microbatches * (trained + frozen) + batch),
        "backward": Part(1, microbatches * (trained + frozen) + trained),
        "other": Part(1, trained + 2 * state),
    }

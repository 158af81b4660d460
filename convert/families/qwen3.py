"""Qwen3 (dense): queries and keys are normalised per head; no biases; the head size is stated.

Reference: transformers' Qwen3ForCausalLM.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni2_jax.config import DecoderConfig
from omni2_jax.convert.families import decoder_names
from omni2_jax.convert.families.decoder_names import LAYER
from omni2_jax.convert.json_files import short
from omni2_jax.convert.plan import ConversionError, Rule, Table

NAME: str = "Qwen3"


def holds(config: DecoderConfig) -> bool:
    """Whether Qwen3's layout holds a decoder with these dimensions."""
    return config.qk_norm and not config.qkv_bias


def read_config(config: Mapping[str, Any], context: Path | str) -> DecoderConfig:
    """The dimensions in a Hugging Face config.

    Raises ConversionError, which starts with `context`, if a dimension is missing or out of range,
    or if the model has an option that `Decoder` does not have.
    """
    if bias := config.get("attention_bias"):
        raise ConversionError(f"{context}: attention_bias is {short.repr(bias)}, expected false")
    head_size = config.get("head_dim", 128)  # transformers' default
    if head_size == 0:  # DecoderConfig would derive it
        raise ConversionError(f"{context}: head_dim is 0, expected a positive number")
    return decoder_names.read_config(config, context, head_size, qkv_bias=False, qk_norm=True)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return decoder_names.write_config(config) | {"attention_bias": False}


def table(config: DecoderConfig) -> Table:
    """Hugging Face's names of the weights <-> the parameters of `Decoder`."""
    return decoder_names.table(config) + Table(
        (
            Rule(f"{LAYER}self_attn.q_norm.weight", "layers.attention.query_norm.scale"),
            Rule(f"{LAYER}self_attn.k_norm.weight", "layers.attention.key_norm.scale"),
        )
    )

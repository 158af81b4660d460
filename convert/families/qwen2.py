"""Qwen2 and Qwen2.5: biases of query, key and value; heads divide the width.

Reference: transformers' Qwen2ForCausalLM.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni2_jax.config import DecoderConfig
from omni2_jax.convert.families import decoder_names
from omni2_jax.convert.families.decoder_names import LAYER
from omni2_jax.convert.plan import Rule, Table, flat

NAME: str = "Qwen2"


def holds(config: DecoderConfig) -> bool:
    """Whether Qwen2's layout holds a decoder with these dimensions."""
    derived = config.head_size * config.heads == config.width
    return config.qkv_bias and not config.qk_norm and derived


def read_config(config: Mapping[str, Any], context: Path | str) -> DecoderConfig:
    """The dimensions in a Hugging Face config.

    Raises ConversionError, which starts with `context`, if a dimension is missing or out of range,
    or if the model has an option that `Decoder` does not have.
    """
    # A head size of 0 is replaced by width // heads.
    return decoder_names.read_config(config, context, 0, qkv_bias=True, qk_norm=False)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    content = decoder_names.write_config(config)
    del content["head_dim"]  # Qwen2 derives it
    return content


def table(config: DecoderConfig) -> Table:
    """Hugging Face's names of the weights <-> the parameters of `Decoder`."""
    biases = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return decoder_names.table(config) + Table(
        tuple(
            Rule(f"{LAYER}self_attn.{theirs}.bias", f"layers.attention.{ours}.bias", flat)
            for ours, theirs in biases.items()
        )
    )

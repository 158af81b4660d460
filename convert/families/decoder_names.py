"""What decoder families share in Hugging Face's layout: names in config.json and of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni2_jax.config import DecoderConfig
from omni2_jax.convert.json_files import checked, short
from omni2_jax.convert.plan import ConversionError, Rule, Table, kernel

LAYER = "model.layers.{i}."
FIELDS = {  # ours -> theirs
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
OPTIONAL = {  # ours -> (theirs, transformers' default)
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "max_positions": ("max_position_embeddings", 32768),
}
NAMES = (
    FIELDS
    | {ours: theirs for ours, (theirs, _) in OPTIONAL.items()}
    | {
        "kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "rope_theta": "rope_theta",
    }
)


def read_config(
    config: Mapping[str, Any], context: Path | str, head_size: Any, **family: Any
) -> DecoderConfig:
    """The dimensions in a Hugging Face config.

    head_size: as the family states it. family: fields of DecoderConfig that the family fixes.
    Raises ConversionError, which starts with `context`, if a dimension is missing or out of range,
    or if the model has an option that `Decoder` does not have.
    """
    if absent := [theirs for theirs in FIELDS.values() if theirs not in config]:
        raise ConversionError(f"{context} has no {', '.join(map(repr, absent))}")
    check_options(config, context)
    fields = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    fields |= {ours: config.get(name, default) for ours, (name, default) in OPTIONAL.items()}
    fields["kv_heads"] = config.get("num_key_value_heads", config["num_attention_heads"])
    fields["rope_theta"] = config.get("rope_theta", rope(config, context).get("rope_theta", 1e4))
    return checked(DecoderConfig, context, fields | {"head_size": head_size} | family, NAMES)


def check_options(config: Mapping[str, Any], context: Path | str) -> None:
    """Raise ConversionError if the model has an option that `Decoder` does not have."""
    kind = rope(config, context).get("rope_type", rope(config, context).get("type", "default"))
    windows = config.get("layer_types") or []
    others = not isinstance(windows, list) or any(kind != "full_attention" for kind in windows)
    if config.get("use_sliding_window") or others or kind != "default":
        raise ConversionError(
            f"{context}: sliding windows and scaled positions are not supported "
            "(no LLaMA-Omni2 release uses them)"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConversionError(f"{context}: hidden_act is {short.repr(activation)}, expected 'silu'")


def rope(config: Mapping[str, Any], context: Path | str) -> Mapping[str, Any]:
    """The settings of the rotary positions; transformers 5 calls them rope_parameters.

    Raises ConversionError, which starts with `context`, if they are no object.
    """
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConversionError(
            f"{context}: {name} is {short.repr(value)}, expected null or an object"
        )
    return value


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The dimensions under Hugging Face's names; the inverse of `read_config`."""
    content = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    return content | {"hidden_act": "silu", "use_sliding_window": False}


def table(config: DecoderConfig) -> Table:
    """Names of the weights that every family has. A tied head is an alias of the embedding."""
    rules = [
        Rule("model.embed_tokens.weight", "embedding.table"),
        Rule("model.norm.weight", "norm.scale"),
        Rule(LAYER + "input_layernorm.weight", "layers.attention_norm.scale"),
        Rule(LAYER + "post_attention_layernorm.weight", "layers.mlp_norm.scale"),
        Rule(LAYER + "self_attn.o_proj.weight", "layers.attention.out.kernel", kernel(in_dims=2)),
    ]
    projections = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    rules += [
        Rule(f"{LAYER}{theirs}.weight", f"layers.{ours}.kernel", kernel())
        for ours, theirs in projections.items()
    ]
    if config.tied:
        return Table(tuple(rules), aliases={"lm_head.weight": "model.embed_tokens.weight"})
    return Table((*rules, Rule("lm_head.weight", "head.kernel", kernel())))

"""Hugging Face Qwen2 names <-> `omni2_jax.qwen2.Qwen2`."""

from omni2_jax.config import DecoderConfig
from omni2_jax.convert.plan import Rule, Table, flat, kernel

LAYER = "model.layers.{i}."


def table(config: DecoderConfig) -> Table:
    rules = [
        Rule("model.embed_tokens.weight", "embedding.table"),
        Rule("model.norm.weight", "norm.scale"),
        Rule(LAYER + "input_layernorm.weight", "layers.attention_norm.scale"),
        Rule(LAYER + "post_attention_layernorm.weight", "layers.mlp_norm.scale"),
        Rule(LAYER + "self_attn.o_proj.weight", "layers.attention.out.kernel", kernel(in_dims=2)),
    ]
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        rules.append(
            Rule(f"{LAYER}self_attn.{theirs}.weight", f"layers.attention.{ours}.kernel", kernel())
        )
        rules.append(Rule(f"{LAYER}self_attn.{theirs}.bias", f"layers.attention.{ours}.bias", flat))
    for ours, theirs in {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}.items():
        rules.append(Rule(f"{LAYER}mlp.{theirs}.weight", f"layers.mlp.{ours}.kernel", kernel()))
    if config.tied:
        return Table(tuple(rules), aliases={"lm_head.weight": "model.embed_tokens.weight"})
    return Table((*rules, Rule("lm_head.weight", "head.kernel", kernel())))

"""Whisper's encoder, OpenAI's or Hugging Face's names <-> `models.speech_encoder.SpeechEncoder`.

References: `AudioEncoder` of openai/whisper, `WhisperEncoder` of transformers.
"""

from omni2_jax.convert.plan import Rule, Table, conv, flat, kernel

# ours -> (OpenAI, Hugging Face)
BLOCK = {
    "query": ("attn.query", "self_attn.q_proj"),
    "key": ("attn.key", "self_attn.k_proj"),
    "value": ("attn.value", "self_attn.v_proj"),
    "out": ("attn.out", "self_attn.out_proj"),
    "up": ("mlp.0", "fc1"),
    "down": ("mlp.2", "fc2"),
}
NORMS = {
    "blocks.attention_norm": ("blocks.{i}.attn_ln", "layers.{i}.self_attn_layer_norm"),
    "blocks.mlp_norm": ("blocks.{i}.mlp_ln", "layers.{i}.final_layer_norm"),
    "norm": ("ln_post", "layer_norm"),
}


def table(hugging_face: bool = False) -> Table:
    """The table of an encoder in OpenAI's names, or in Hugging Face's."""
    column, prefix = (1, "layers.{i}.") if hugging_face else (0, "blocks.{i}.")
    positions = "embed_positions.weight" if hugging_face else "positional_embedding"
    rules = [Rule(positions, "positions")]
    for name in ("conv1", "conv2"):
        rules += [
            Rule(f"{name}.weight", f"{name}.kernel", conv),
            Rule(f"{name}.bias", f"{name}.bias"),
        ]
    for ours, names in NORMS.items():
        rules += [
            Rule(f"{names[column]}.weight", f"{ours}.scale"),
            Rule(f"{names[column]}.bias", f"{ours}.bias"),
        ]
    for ours, names in BLOCK.items():
        theirs = prefix + names[column]
        rules.append(
            Rule(
                f"{theirs}.weight",
                f"blocks.{ours}.kernel",
                kernel(in_dims=2 if ours == "out" else 1),
            )
        )
        if ours != "key":
            rules.append(Rule(f"{theirs}.bias", f"blocks.{ours}.bias", flat))
    return Table(tuple(rules))

"""A LLaMA-Omni2 release <-> speech encoder, adapter, LLM, gate fusion and speech LM."""

from omni2_jax.config import Omni2Config
from omni2_jax.convert.families import qwen2
from omni2_jax.convert.plan import Rule, Table, kernel
from omni2_jax.convert.tables import whisper


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", kernel()),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


adapter = Table((*linear("linear1", "up"), *linear("linear2", "down")))
fusion = Table(
    (*linear("input_proj.0", "up"), *linear("input_proj.2", "down"), *linear("gate.0", "gate"))
)


def table(config: Omni2Config) -> Table:
    """The table of all five parts; `config` must have both language models."""
    assert config.llm and config.speech_lm
    return (
        whisper.table().at("model.speech_encoder.", "speech_encoder.")
        + adapter.at("model.speech_projector.", "adapter.")
        + qwen2.table(config.llm).at("", "llm.")
        + fusion.at("speech_generator.", "fusion.")
        + qwen2.table(config.speech_lm).at("speech_generator.model.", "speech_lm.")
    )

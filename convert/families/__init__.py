"""The families of language models that can be the LLM or the speech LM.

A family is a module with the five names of `Family`. Adding one is such a module and its line in
FAMILIES; `decoder_names.py` has what families in Hugging Face's layout share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omni2_jax.config import DecoderConfig
from omni2_jax.convert.families import qwen2, qwen3
from omni2_jax.convert.plan import ConversionError, Table


class Family(Protocol):
    """What the converter has to know of a family."""

    NAME: str  # for messages

    def holds(self, config: DecoderConfig) -> bool:
        """Whether this family's layout holds a decoder with these dimensions."""
        ...

    def read_config(self, config: Mapping[str, Any], context: Path | str) -> DecoderConfig:
        """The dimensions in a Hugging Face config. Raises ConversionError if they do not fit."""
        ...

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of `read_config`."""
        ...

    def table(self, config: DecoderConfig) -> Table:
        """Hugging Face's names of the weights <-> the parameters of `Decoder`."""
        ...


FAMILIES: dict[str, Family] = {  # by the model_type of a Hugging Face config.json
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def of_config(config: Mapping[str, Any], context: Path | str) -> Family:
    """The family that a Hugging Face config.json names.

    Raises ConversionError, which starts with `context`, if there is no such family here.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = " or ".join(repr(name) for name in FAMILIES)
        raise ConversionError(f"{context}: model_type is {kind!r}, expected {known}")
    return FAMILIES[kind]


def of_decoder(config: DecoderConfig) -> Family | None:
    """The family whose layout holds a decoder with these dimensions, or None."""
    return next((family for family in FAMILIES.values() if family.holds(config)), None)

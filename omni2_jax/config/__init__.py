"""The dimensions of every part and of the whole model.

Configurations are frozen dataclasses that pydantic checks when they are made, from a file or in
Python: ranges by the types of the fields (`ranges.py`), relations within a part in `__post_init__`
(`parts.py`), those between parts by `Omni2Config.check` (`model.py`).
"""

from omni2_jax.config.model import DECODER_PARTS, LANGUAGE_PARTS, PARTS, Omni2Config
from omni2_jax.config.parts import (
    FRAMES_PER_UNIT,
    SAMPLES_PER_FRAME,
    UNITS_PER_SECOND,
    AdapterConfig,
    DecoderConfig,
    FlowConfig,
    HiftConfig,
    SpeakerConfig,
    SpeechEncoderConfig,
    SpeechTokenizerConfig,
    TokenConfig,
)

__all__ = [
    "DECODER_PARTS",
    "FRAMES_PER_UNIT",
    "LANGUAGE_PARTS",
    "PARTS",
    "SAMPLES_PER_FRAME",
    "UNITS_PER_SECOND",
    "AdapterConfig",
    "DecoderConfig",
    "FlowConfig",
    "HiftConfig",
    "Omni2Config",
    "SpeakerConfig",
    "SpeechEncoderConfig",
    "SpeechTokenizerConfig",
    "TokenConfig",
]

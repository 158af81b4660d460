"""Vocoders: mel frames to samples. `VOCODERS` is the one place where they are registered."""

from collections.abc import Callable

from flax import nnx

from omni2_jax.config import HiftConfig
from omni2_jax.models.vocoder.base import Vocoder
from omni2_jax.models.vocoder.hift_streaming import StreamingHift

# The class of each kind of config: called with (config, rngs).
VOCODERS: dict[str, Callable[..., Vocoder]] = {"hift": StreamingHift}


def build(config: HiftConfig, rngs: nnx.Rngs) -> Vocoder:
    """The vocoder of this config. Raises ValueError if its kind is not registered."""
    if config.kind not in VOCODERS:
        known = ", ".join(VOCODERS)
        raise ValueError(f"vocoder.kind is {config.kind!r}, expected one of {known}")
    return VOCODERS[config.kind](config, rngs)

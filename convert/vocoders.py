"""The vocoders that a decoder directory may hold, found by the yaml or by a checkpoint's config.

A vocoder is a module with the names of `Vocoder`. Adding one is such a module and its line in
VOCODERS.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from omni2_jax.config import HiftConfig
from omni2_jax.convert.plan import Table
from omni2_jax.convert.tables import hift

T = TypeVar("T")


class Vocoder(Protocol):
    """What the converter has to know of a vocoder."""

    CONFIG: type[HiftConfig]  # its configuration
    FILE: str  # its weights in a decoder directory
    FIELDS: dict[str, str]  # field of CONFIG -> where the yaml states it

    def plain_names(self, source: Mapping[str, T]) -> dict[str, T]:
        """The tensors of FILE under the names of the table."""
        ...

    def table(self, config: HiftConfig) -> Table:
        """The names of the weights <-> the parameters of the vocoder."""
        ...


VOCODERS: dict[str, Vocoder] = {"hift": hift}  # by the name of their section in the yaml


def of_yaml(content: Mapping[str, Any]) -> Vocoder:
    """The vocoder whose section a decoder's yaml has.

    Raises KeyError if it has none of them, TypeError if the content is no mapping.
    """
    for name, vocoder in VOCODERS.items():
        if name in content:
            return vocoder
    raise KeyError(" or ".join(VOCODERS))


def of_config(config: HiftConfig) -> Vocoder:
    """The vocoder that has this configuration."""
    return next(vocoder for vocoder in VOCODERS.values() if isinstance(config, vocoder.CONFIG))

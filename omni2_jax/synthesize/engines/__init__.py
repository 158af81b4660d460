"""Engines that speak. To add one: a module with the methods of `base.Engine`, and its line here."""

from omni2_jax.synthesize.engines.base import Engine, EngineError
from omni2_jax.synthesize.engines.command import CommandEngine
from omni2_jax.synthesize.engines.resident import ResidentEngine
from omni2_jax.synthesize.voices import EngineEntry

__all__ = ["Engine", "EngineError", "open_engine"]


def open_engine(name: str, entry: EngineEntry) -> Engine:
    """The engine of an entry of the voices file."""
    if entry.endpoint:
        from omni2_jax.synthesize.engines.endpoint import EndpointEngine

        return EndpointEngine(name, entry)
    return ResidentEngine(name, entry) if entry.keep_running else CommandEngine(name, entry)

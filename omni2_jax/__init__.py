"""LLaMA-Omni2 in JAX/Flax. `Omni2.load` a checkpoint; `answer` a question; hold a `session`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni2_jax.generate.omni2 import Answer, Omni2, Options

__version__ = "0.2.0"
__all__ = ["Answer", "Omni2", "Options", "__version__"]


def __getattr__(name: str):
    # Imported on demand: `omni2 --help` and the converter do not need the model.
    if name in __all__:
        import omni2_jax.generate.omni2

        return getattr(omni2_jax.generate.omni2, name)
    raise AttributeError(f"module 'omni2_jax' has no attribute {name!r}")

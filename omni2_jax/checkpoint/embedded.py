"""The checkpoint that this package carries, `omni2_jax/nano`, for those who give no other."""

from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "nano"


def or_embedded(checkpoint: Path | None, how: str) -> Path:
    """The checkpoint that is given, else the embedded one.

    how: how to give one, for the message. Raises ValueError if there is neither.
    """
    if checkpoint is not None:
        return checkpoint
    if not (DIRECTORY / "config.json").exists():
        raise ValueError(
            f"this installation carries no model; give a checkpoint: {how} "
            "(`omni2 convert` and `omni2 train` make them)"
        )
    return DIRECTORY

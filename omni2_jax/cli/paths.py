"""Options that name a directory: a local one, or gs://BUCKET/DIRECTORY."""

from pathlib import Path

import typer


def directory(text: str) -> Path:
    """The path that an option names. Raises BadParameter for a bucket that cannot be read."""
    from omni2_jax import remote

    try:
        return remote.as_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

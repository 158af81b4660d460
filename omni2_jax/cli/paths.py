"""Options that name a directory, a local one or gs://BUCKET/DIRECTORY, or a local file."""

from pathlib import Path
from typing import Annotated

import typer


def directory(text: str) -> Path:
    """The path that an option names. Raises BadParameter for a bucket that cannot be read."""
    from omni2_jax import remote

    try:
        return remote.as_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def local_file(text: str) -> Path:
    """The file that an option names. Raises BadParameter for a URL, a path to pathlib."""
    if "://" in text:
        raise typer.BadParameter(f"{text}: expected a local file")
    return Path(text)


Checkpoint = Annotated[
    Path | None,
    typer.Option(
        parser=directory,
        help="A checkpoint directory, as `omni2 convert` makes it. [default: the embedded model]",
    ),
]


def chosen(checkpoint: Path | None) -> Path:
    """The checkpoint of --checkpoint, else the embedded one. Raises ValueError if there is none."""
    from omni2_jax.checkpoint import embedded

    return embedded.or_embedded(checkpoint, "--checkpoint CKPT")

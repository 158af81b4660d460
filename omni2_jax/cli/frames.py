"""`omni2 frames`: the speech encoder's frames of a data set, computed once for all runs of it."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.paths import directory
from omni2_jax.cli.train import Changes, Config


def frames(
    config: Config,
    out: Annotated[Path, typer.Option(parser=directory, help="A new directory.")],
    changes: Changes = None,
) -> None:
    """Compute the speech encoder's frames for runs of stage 1a or 2 with this config.

    A run reads them with --set frames=OUT, and does not compute them any more.
    """
    from omni2_jax.train import config_files

    train_config = config_files.read(config, changes or [])
    from omni2_jax.train import compute_frames

    compute_frames.compute(train_config, out)

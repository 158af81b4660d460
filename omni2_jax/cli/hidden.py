"""`omni2 hidden`: the LLM's hidden states of a data set, computed once for all runs of stage 2."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.paths import directory
from omni2_jax.cli.train import Changes, Config


def hidden(
    config: Config,
    out: Annotated[Path, typer.Option(parser=directory, help="A new directory.")],
    changes: Changes = None,
) -> None:
    """Compute the LLM's hidden states for runs of stage 2 with this config."""
    from omni2_jax.train import config_files

    train_config = config_files.read(config, changes or [])
    from omni2_jax.train import compute_hidden

    compute_hidden.compute(train_config, out)

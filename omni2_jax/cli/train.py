"""`omni2 train`: one stage of training, from a checkpoint to a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.paths import directory

Config = Annotated[
    str,
    typer.Option(
        "--config",
        help="The name of a shipped config, such as stage1a, or a Python file like it.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE"),
]


def train(
    config: Config,
    out: Annotated[
        Path,
        typer.Option(
            parser=directory,
            help="The run's directory; an interrupted run in it is resumed.",
        ),
    ],
    changes: Changes = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Train with several processes; on TPU slices and with SLURM they find each other.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(help="With --distributed, elsewhere: HOST:PORT of process 0."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="With --coordinator: the number of processes.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(help="With --coordinator: the number of this process, from 0.")
    ] = None,
) -> None:
    """Train a stage of LLaMA-Omni2. A run that is stopped before its end exits with code 130."""
    if not distributed and (coordinator, processes, process) != (None, None, None):
        raise typer.BadParameter(
            "--coordinator, --processes and --process are for several processes; add --distributed"
        )
    from omni2_jax.train import config_files

    train_config = config_files.read(config, changes or [])
    import jax  # after the settings, whose faults are then reported without waiting for a device

    if distributed:
        jax.distributed.initialize(coordinator, processes, process)
    from omni2_jax.train.loop import Run

    if not Run(train_config, out).go():
        raise typer.Exit(130)

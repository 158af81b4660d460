"""`omni2 train`: one stage of training, from a checkpoint to a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    str,
    typer.Option("--config", help="stage1a, stage1b, stage2, flow, or a Python file like them."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE"),
]


def train(
    config: Config,
    out: Annotated[
        Path, typer.Option(help="The run's directory; one that was cut off is taken up again.")
    ],
    changes: Changes = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Several processes: TPU slices and SLURM tell who they are."
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(help="With --distributed, where nothing tells: HOST:PORT of process 0."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="With --coordinator: how many processes there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(help="With --coordinator: which of them this is.")
    ] = None,
) -> None:
    """Train a stage of LLaMA-Omni2."""
    from omni2_jax.train import settings

    train_config = settings.read(config, changes or [])
    import jax  # after the settings, which need no accelerator to be found wrong

    if distributed:
        jax.distributed.initialize(coordinator, processes, process)
    from omni2_jax.train.loop import Run

    Run(train_config, out).go()

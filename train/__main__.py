"""`python -m train`: one stage of training, from a checkpoint to a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax import command
from train import config

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def train(
    file: Annotated[Path, typer.Option("--config", help="A configs/*.py file, for example configs/stage1a.py.")],
    out: Annotated[Path, typer.Option(help="The run's directory; one that was cut off is taken up again.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change a setting (repeatable).", metavar="KEY=VALUE")] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Several processes: TPU slices and SLURM tell who they are.")] = False,
    coordinator: Annotated[str | None, typer.Option(help="With --distributed, where nothing tells: HOST:PORT of process 0.")] = None,
    processes: Annotated[int | None, typer.Option(help="With --coordinator: how many processes there are.")] = None,
    process: Annotated[int | None, typer.Option(help="With --coordinator: which of them this is.")] = None,
) -> None:
    """Train a stage of LLaMA-Omni2."""
    settings = config.read(file, changes or [])
    import jax  # after the settings, which need no accelerator to be found wrong

    if distributed:
        jax.distributed.initialize(coordinator, processes, process)
    from train.loop import Run

    Run(settings, out).go()


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()

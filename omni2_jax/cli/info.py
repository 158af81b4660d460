"""`omni2 info`: describe a checkpoint."""

from pathlib import Path
from typing import Annotated

import rich.console
import rich.table
import typer


def info(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
) -> None:
    """What a checkpoint holds: sizes, parameters, R and W, voices."""
    from omni2_jax.checkpoint import info as described

    table = rich.table.Table(
        "part", "dimensions", "parameters", "stored as", "MB", title=str(checkpoint)
    )
    parts = described.parts(checkpoint)
    for part in parts:
        table.add_row(
            part.name,
            part.dimensions,
            f"{part.parameters:,}",
            part.dtype,
            f"{part.bytes / 1e6:,.1f}",
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{sum(p.parameters for p in parts):,}",
        "",
        f"{sum(p.bytes for p in parts) / 1e6:,.1f}",
    )
    console = rich.console.Console()
    console.print(table)
    for name, value in described.facts(checkpoint).items():
        console.print(f"{name}: {value}", highlight=False, markup=False)

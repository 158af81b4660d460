"""`omni2 evaluate report`: the paper's tables with measured rows, and plots."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Directories that `omni2 evaluate --out` wrote."),
    ],
    out: Annotated[Path, typer.Option(help="Where report.md and its plots are written.")] = Path(
        "report"
    ),
    run: Annotated[
        list[Path] | None,
        typer.Option(help="A directory of `omni2 train`, whose curves are drawn; may be repeated."),
    ] = None,
) -> None:
    """Write report.md: measured rows beside the paper's, each marked, with plots."""
    from omni2_jax.evaluate.report.write import write_report

    print(write_report(folders, out, run or ()))

"""`omni2 info`: describe a checkpoint, or check all of it."""

from pathlib import Path
from typing import Annotated

import rich.console
import rich.progress
import rich.table
import rich.text
import typer

from omni2_jax.cli.paths import directory
from omni2_jax.console import progress_bar, say


def info(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            parser=directory,
            metavar="CKPT",
            help="A checkpoint directory. [default: the embedded model]",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all parameters and check their checksums.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: sizes, parameters, R and W, voices."""
    from omni2_jax.checkpoint import embedded
    from omni2_jax.checkpoint import info as contents

    checkpoint = embedded.or_embedded(checkpoint, "omni2 info CKPT")
    if verify:
        verify_all(checkpoint)
        return
    parts = contents.parts(checkpoint)
    table = rich.table.Table(
        "part",
        "dimensions",
        "parameters",
        "stored as",
        "MB",
        title=rich.text.Text(str(checkpoint)),  # a string would be read as markup
    )
    for part in parts:
        count, megabytes = f"{part.parameters:,}", f"{part.bytes / 1e6:,.1f}"
        table.add_row(part.name, part.dimensions, count, part.dtype, megabytes)
    table.add_section()
    total_count = sum(part.parameters for part in parts)
    total_bytes = sum(part.bytes for part in parts)
    table.add_row("all", "", f"{total_count:,}", "", f"{total_bytes / 1e6:,.1f}")
    console = rich.console.Console()
    console.print(table)
    if about := contents.about(checkpoint):
        console.print(about, highlight=False, markup=False)
    for name, value in contents.facts(checkpoint).items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    if unprotected := [part.name for part in parts if not part.checksums]:
        console.print(
            f"no checksums (written by version 0.1): {', '.join(unprotected)}",
            highlight=False,
            markup=False,
        )


def verify_all(checkpoint: Path) -> None:
    """Print a line for each damaged file or parameter. Raises typer.Exit(1) if there is one."""
    from omni2_jax.checkpoint import info as contents
    from omni2_jax.checkpoint import verify

    faults = list(verify.damaged_files(checkpoint))
    arrays, unreadable = verify.list_arrays(checkpoint)
    faults += unreadable
    if not arrays and not faults:
        raise ValueError(f"{checkpoint} holds no parameters")
    size = sum(array.nbytes for array in arrays)
    with progress_bar(rich.progress.DownloadColumn()) as bar:
        task = bar.add_task("verifying", total=size)
        faults += verify.damaged_arrays(arrays, lambda array: bar.advance(task, array.nbytes))
    for fault in dict.fromkeys(faults):
        say(f"error: {fault}")
    if faults:
        raise typer.Exit(1)
    unprotected = [part.name for part in contents.parts(checkpoint) if not part.checksums]
    note = f"; no checksums to compare with: {', '.join(unprotected)}" if unprotected else ""
    print(f"{checkpoint}: all {len(arrays)} parameters ({size / 1e6:,.1f} MB) are sound{note}")

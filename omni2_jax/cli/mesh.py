"""The option --mesh, which several subcommands have."""

from typing import Annotated

import typer

Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=SIZE,...",
        help="Share the model among all devices, as tensor=4 or fsdp=2,tensor=4.",
    ),
]

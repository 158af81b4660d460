"""How a command line ends that cannot do what it was asked: one line on stderr, exit code 1."""

import sys
from collections.abc import Callable

import typer


def run(app: Callable[[], None]) -> None:
    """Run a typer app; every foreseen failure, whatever its text, is a single line."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def of(main: Callable[..., None]) -> None:
    """Run a command line that is one function."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run(app)

"""What all command lines share: the console for notes, the progress bar, and how a command that fails ends."""

import os
import sys
from collections.abc import Callable

import rich.console
import rich.progress
import typer

console = rich.console.Console(stderr=True)  # stdout is for what was asked for: text, audio, tables

EXTRAS = {  # the optional dependencies of a command, by the extra that installs them
    "convert": ("onnx", "safetensors", "torch", "yaml"),
    "train": ("array_record", "grain", "msgpack", "tensorboardX"),
}


def new_app(**settings) -> typer.Typer:
    """A typer application whose failures are plain lines."""
    plain = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
    return typer.Typer(**plain, **settings)


def say(text: str) -> None:
    """Print a note as it is: no markup, no wrapping."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def progress_bar(*columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
    """A description, a bar, `columns`, and the time that remains."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run an application on `arguments` (default: the process's) and exit.

    Every foreseen failure, and every misuse of an option, is a single line on stderr with exit code 1. The environment variable
    OMNI2_TRACEBACK=1 shows the traceback instead.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("OMNI2_TRACEBACK") == "1" or not (line := failure(error)):
            raise
        sys.exit(f"error: {' '.join(line.split())}")
    sys.exit(code if isinstance(code, int) else 0)


def failure(error: Exception) -> str | None:
    """What to tell the user of a foreseen failure; None for a defect of this program."""
    if hasattr(
        error, "format_message"
    ):  # a misused option: click's class, or the copy of it within typer
        return error.format_message()
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
        return (
            extra
            and f"{module} is not installed; install it with: pip install 'omni2-jax[{extra}]'"
        )
    return str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) else None


def run_function(main: Callable[..., None]) -> None:
    """Run a command line that is a single function."""
    app = new_app()
    app.command()(main)
    run(app)

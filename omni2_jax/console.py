"""What all commands share: the console, the progress bar, and how a failed command ends."""

import os
import sys
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress
import typer

# Notes go to stderr. Stdout is for results: text, audio, tables.
console = rich.console.Console(stderr=True)

# Modules that only some commands need, by the extra of the package that installs them.
EXTRAS = {
    "convert": ("onnx", "safetensors", "torch", "yaml"),
    "synthesize": ("inflect", "openai"),
    "train": ("array_record", "grain", "msgpack", "pyarrow", "tensorboardX"),
    "serve": ("prometheus_client", "python_multipart", "starlette", "uvicorn"),
    "evaluate": (
        "faster_whisper",
        "jiwer",
        "librosa",
        "matplotlib",
        "speechmos",
        "whisper_normalizer",
    ),
    "ray": ("ray",),
    "record": ("sounddevice",),
}


def new_app() -> typer.Typer:
    """A typer application that prints plain help and leaves exceptions to `run`."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def say(text: str) -> None:
    """Print a note as it is: no markup, no wrapping."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def progress_bar(*columns: rich.progress.ProgressColumn | str) -> rich.progress.Progress:
    """A description, a bar, `columns`, and the time that remains."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def run(app: typer.Typer, arguments: list[str] | None = None, program: str | None = None) -> None:
    """Run `app` on `arguments` (None: those of the process) and exit the process.

    A foreseen failure, a misused option included, prints one line on stderr and exits with code 1;
    an interrupt exits with code 130. With the environment variable OMNI2_TRACEBACK=1 a failure
    shows its traceback instead. `program` is the command's name in the help.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name=program, standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = failure(error)
        if line is None or os.environ.get("OMNI2_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {' '.join(line.split())}")
    sys.exit(code if isinstance(code, int) else 0)


def failure(error: Exception) -> str | None:
    """The message for the user if `error` was foreseen; None if it is a defect of this program."""
    # A misused option. The class is click's, or typer's own copy of it: only the method is shared.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return format_message()
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    return str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) else None


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """How to install the module that `error` names; None if no extra of this package has it."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            install = f"pip install 'omni2-jax[{extra}]'"
            return f"{module} is not installed; install it with: {install}"
    return None


def run_function(main: Callable[..., Any]) -> None:
    """Run a command line that consists of the single function `main`, and exit the process."""
    app = new_app()
    app.command()(main)
    run(app)

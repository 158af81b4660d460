"""The `omni2` command: one application, one file for each of its subcommands."""

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from omni2_jax import __version__
from omni2_jax.cli import chat, console, convert, hidden, info, prepare, train

app = console.new_app(no_args_is_help=True)
for subcommand in (
    chat.chat,
    convert.convert,
    prepare.prepare,
    train.train,
    hidden.hidden,
    info.info,
):
    app.command()(subcommand)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"omni2-jax {__version__}")
        raise typer.Exit()


@app.callback()
def omni2(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LLaMA-Omni2 in JAX: a language model that hears a spoken question and answers in text and in speech at once."""


def excepthook(kind, value, trace) -> None:
    """Show only the main thread's exception: when one parameter cannot be read, the threads that read the others fail too."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, value, trace)


def main(*arguments: str) -> None:
    """The entry point of `omni2`; `python -m convert` and `python -m train` call it with their subcommand in `arguments`."""
    # A run finds what an earlier one has compiled. JAX reads this when it is first imported, which is later.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "omni2-jax"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it advises to install PyTorch
    sys.excepthook = excepthook
    sys.unraisablehook = threading.excepthook = lambda _: None
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # reads that were given up log their failures
    console.run(app, [*arguments, *sys.argv[1:]])


if __name__ == "__main__":
    main()

"""The `omni2` command. Each of its subcommands is one file of this folder."""

import logging
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from omni2_jax import __version__, console
from omni2_jax.cli import (
    chat,
    convert,
    evaluate,
    frames,
    hidden,
    info,
    join,
    new,
    prepare,
    serve,
    speak,
    synthesize,
    train,
)

SUBCOMMANDS = (
    chat.chat,
    convert.convert,
    new.new,
    join.join,
    prepare.prepare,
    train.train,
    frames.frames,
    hidden.hidden,
    info.info,
    serve.serve,
    speak.speak,
)

app = console.new_app()
for subcommand in SUBCOMMANDS:
    app.command()(subcommand)
app.add_typer(synthesize.app, name="synthesize")
app.add_typer(evaluate.app, name="evaluate")


def show_version(requested: bool) -> None:
    if requested:
        print(f"omni2-jax {__version__}")
        raise typer.Exit()


@app.callback()
def omni2(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LLaMA-Omni2 in JAX: a language model that answers speech in text and speech."""


def show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of the main thread only.

    When one parameter cannot be read, the threads that read the others fail as a consequence.
    """
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


def silence(_: object) -> None:
    """An exception hook that prints nothing."""


def main(*arguments: str) -> None:
    """Run `omni2` with `arguments`, then those of the process, and exit.

    `python -m convert` and `python -m train` pass the name of their subcommand. Without any
    argument the help is printed.
    """
    # A process reuses what an earlier one has compiled. JAX reads this variable when it is first
    # imported, and the subcommands import it only when they run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "omni2-jax"))
    # Programs that compile in less than a second, which JAX leaves out, take seconds together.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice to install PyTorch
    sys.excepthook = show_exception
    sys.unraisablehook = threading.excepthook = silence
    # asyncio logs the failure of reads that were cancelled because another one failed.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    console.run(app, [*arguments, *sys.argv[1:]] or ["--help"], program="omni2")


if __name__ == "__main__":
    main()

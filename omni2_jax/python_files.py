"""Python files that define settings: those shipped in configs/, by name, and those of the user."""

import difflib
import runpy
from pathlib import Path
from typing import Any

from omni2_jax.console import missing_extra

SHIPPED = Path(__file__).parent / "configs"


def find(source: str | Path, kind: str) -> Path:
    """The file that `source` names: a path, or a shipped file ("stage1a").

    kind: the class whose instance the file is to define; shipped files of other kinds are not
    offered. Raises ValueError if there is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in SHIPPED.glob("*.py") if f"{kind}(" in file.read_text()}
    if str(source) in shipped:
        return shipped[str(source)]
    beside = map(str, path.parent.glob("*.py")) if path.parent.is_dir() else ()
    close = difflib.get_close_matches(str(source), sorted([*beside, *shipped]), 1, 0.5)
    suggestion = f"; did you mean {close[0]}?" if close else ""
    names = ", ".join(sorted(shipped))
    raise ValueError(f"config {source} does not exist{suggestion}; shipped: {names}")


def run(path: Path) -> dict[str, Any]:
    """What a file defines, by name.

    Raises ValueError naming the file if it cannot be run, with the error as its cause;
    ModuleNotFoundError if an extra of this package is not installed.
    """
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # a config file is a program and may raise anything
        if isinstance(error, ModuleNotFoundError) and missing_extra(error):
            raise
        raise ValueError(f"config {path}: {type(error).__name__}: {error}") from error

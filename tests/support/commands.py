"""The `omni2` command, run in this process or in one of its own, and how it refuses bad input."""

import os
import subprocess
import sys
from pathlib import Path

from omni2_jax.generate import omni2 as omni2_module

# The options of tests.support.conversations.GREEDY, as a command line.
QUICK_OPTIONS = [
    *("--unit-temperature", 0, "--unit-vocabulary", "all", "--chunk", 10, "--left-chunks", 2),
    *("--max-new-tokens", 64, "--max-flush-units", 60),
]


def chat(checkpoint: Path | str, *args: object) -> list[object]:
    """The arguments of `omni2 chat` with the options of the tests."""
    return ["chat", "--checkpoint", checkpoint, *QUICK_OPTIONS, *args]


def process(*args: object) -> subprocess.CompletedProcess:
    """Run `omni2` in a process of its own, with the tests' buffer sizes: the cache holds them."""
    code = (
        "from omni2_jax.cli.main import main; from omni2_jax.generate import omni2; "
        f"omni2.BUCKET = {omni2_module.BUCKET}; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, timeout=300
    )


def is_error_line(line: object) -> bool:
    """True if the command's exit value is one line of an error."""
    return isinstance(line, str) and line.startswith("error: ") and "\n" not in line


def assert_refused(
    result: tuple[object, str, str], directory: Path, *words: str, allowed: set[str]
) -> None:
    """Assert one error line with `words`, no output, and only `allowed` in the directory."""
    line, out, _ = result
    assert is_error_line(line) and isinstance(line, str) and out == ""
    for word in words:
        assert word in line
    assert set(os.listdir(directory)) <= allowed

"""Files and directories that appear whole or not at all."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` only when the block ends well; otherwise nothing is left behind."""
    if out.exists():
        raise ValueError(f"{out} exists already; give a new directory")
    work = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    try:
        yield work
        work.rename(out)
    finally:
        remove_directory(work)


def remove_directory(directory: Path, seconds: float = 10) -> None:
    """Delete a directory, into which tensorstore goes on writing for a moment when it is interrupted."""
    deadline = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

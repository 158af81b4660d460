"""Files and directories that appear whole or not at all."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from omni2_jax import remote


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """An open file that becomes `path` when the block ends without an error.

    Otherwise `path` stays what it was and nothing is left beside it. A process that is killed
    leaves its unfinished file behind (see `is_partial`).

        with atomic_write(directory / "config.json") as file:
            json.dump(config, file)

    mode: "w" for text (UTF-8), "wb" for bytes. Raises ValueError naming `path` if the file system
    refuses it: no such directory, no permission, no space.
    """
    if remote.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            with atomic_write(Path(folder) / path.name, mode) as file:
                yield file
            # An object appears when all of it has arrived.
            remote.copy_directory(Path(folder), path.parent)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or the name may reach the disk before the content does
        partial.replace(path)
    except OSError as error:
        # The block may fail for reasons of its own; those errors name another file.
        if error.filename not in (None, str(partial)):
            raise
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def is_partial(path: Path) -> bool:
    """True for a file that `atomic_write` had not finished when its process was killed."""
    return path.name.startswith(".") and path.suffix == ".partial"


def open_locked(path: Path, in_use: str) -> IO[bytes]:
    """A file to append to, made if it is missing; until it is closed it is locked.

    On a file system without locks it is not. Raises ValueError with the message `in_use` if it is
    locked already, and ValueError naming `path` if it cannot be written.
    """
    try:
        file = path.open("a+b")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(in_use) from None
    except OSError:  # a file system without locks
        pass
    return file


def exists(directory: Path) -> bool:
    """Whether a directory, or a file, is there; an unfinished one in Cloud Storage is not."""
    return directory.exists() and not remote.is_unfinished(directory)


def check_new(out: Path) -> None:
    """Raise ValueError if there is something where `atomic_directory` is to make a directory."""
    if exists(out):
        raise ValueError(f"{out} exists already; give a new directory")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` when the block ends without an error.

    Otherwise nothing is left behind. A directory in Cloud Storage is made on this machine and then
    copied; what is left of it by a command that was killed meanwhile is removed first. Raises
    ValueError if `out` exists (`check_new`), or cannot be written to.
    """
    check_new(out)
    if remote.is_remote(out):
        if remote.is_unfinished(out):
            remote.remove(out)
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            try:
                remote.upload_directory(Path(folder), out)
            except BaseException:
                remote.remove(out)
                raise
        return
    partial = out.with_name(out.name + ".partial")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    try:
        yield partial
        partial.rename(out)
    finally:
        remove_directory(partial)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty: `out` lies there
                parent.rmdir()


def remove_directory(directory: Path, seconds: float = 10) -> None:
    """Delete a directory if it exists; give up after so many `seconds`.

    It is tried again and again, because an interrupted tensorstore goes on writing for a moment.
    """
    if remote.is_remote(directory):
        remote.remove(directory)
        return
    deadline = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def short(value: object) -> str:
    """A value as it is written in Python, for a message: at most its first 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Directories in Google Cloud Storage: gs://BUCKET/DIR instead of a local path.

Orbax and tensorstore read and write parameters there themselves. Other libraries want local files:
tokenizers and data sets are copied to this machine, and a run's reports from it. Cloud Storage has
no rename: a directory is complete when it has its marker, the file that readers open first, which
is written last. As long as one is copied there, it holds the file UNFINISHED, too: what a killed
command leaves is then told from directories of other content.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, cast

from etils import epath

# The file that readers of a checkpoint, a data set, hidden states or encoder frames open first.
MARKERS = ("config.json", "dataset.json", "hidden.json", "frames.json")
UNFINISHED = ".unfinished"


def as_path(text: str | PurePath) -> Path:
    """A local path, or one in Cloud Storage, which has the methods of one.

    pathlib would make gs:/bucket of gs://bucket. Raises ValueError for another scheme than gs, or
    if the bucket cannot be read.
    """
    scheme, separator, rest = str(text).partition("://")
    if not separator:
        return Path(text)
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket:
        raise ValueError(f"{text}: expected a local path or gs://BUCKET/DIRECTORY")
    check_bucket(bucket)
    return cast(Path, epath.Path(text))


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raise ValueError unless the bucket can be read from here."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// paths need gcsfs; install it with: pip install 'omni2-jax[gcs]'")
    import fsspec
    import fsspec.config

    # A process must see the files that another one has written in the meantime.
    for protocol in ("gcs", "gs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    try:
        fsspec.filesystem("gcs").ls(bucket)
    except Exception as error:  # of gcsfs, aiohttp or google.auth
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"gs://{bucket} cannot be read: {reason}") from None


def is_remote(path: PurePath) -> bool:
    """Whether a path is in Cloud Storage."""
    return str(path).startswith("gs://")


def absolute(path: Path) -> Path:
    """A path that does not depend on the working directory."""
    return path if is_remote(path) else path.absolute()


def cache_directory() -> Path:
    """Where copies of remote files are kept: OMNI2_CACHE, default ~/.cache/omni2-jax."""
    return Path(os.environ.get("OMNI2_CACHE", Path.home() / ".cache" / "omni2-jax"))


def files(directory: Path) -> Iterator[Path]:
    """All files below a directory."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from files(path)
        else:
            yield path


def local_copy(directory: Path) -> Path:
    """A directory itself, or the copy on this machine of a directory in Cloud Storage.

    The copy is made once: its name holds a hash of the names, sizes and times of the files.
    """
    if not is_remote(directory):
        return directory
    sources = list(files(directory)) if directory.exists() else []
    listing = [(str(path), path.stat().length, path.stat().mtime) for path in cast(Any, sources)]
    name = hashlib.sha256(repr((str(directory), listing)).encode()).hexdigest()[:32]
    copy = cache_directory() / "remote" / name
    if copy.is_dir():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one machine may copy at the same time; the first one to finish wins.
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=f"{name}.") as work:
        complete = Path(work) / "complete"
        complete.mkdir()
        copy_files(directory, complete, sources)
        try:
            complete.rename(copy)
        except OSError:
            if not copy.is_dir():
                raise
    return copy


def copy_files(source: Path, target: Path, paths: Collection[Path]) -> None:
    """Copy some files of a directory to the same places in another one, markers last."""
    for path in sorted(paths, key=lambda path: path.name in MARKERS):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, place.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**20)


def remove(directory: Path) -> None:
    """Delete a directory if it exists, its marker first."""
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        for name in MARKERS:
            (directory / name).unlink(missing_ok=True)
        cast(Any, directory).rmtree()


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory; `target` has no marker until it is complete."""
    copy_files(source, target, list(files(source)))


def upload_directory(source: Path, target: Path) -> None:
    """Copy a directory to a new one in Cloud Storage, which is unfinished until it is complete."""
    (target / UNFINISHED).write_text("A command is copying files to here, or was killed.\n")
    copy_directory(source, target)
    (target / UNFINISHED).unlink()


def is_unfinished(directory: Path) -> bool:
    """Whether a directory is what a killed `upload_directory` has left in Cloud Storage."""
    if not is_remote(directory) or not (directory / UNFINISHED).exists():
        return False
    return not any((directory / name).exists() for name in MARKERS)


class Mirror:
    """Files that a run writes bit by bit: a local directory, and its copy in Cloud Storage.

    For a local `directory` it is that directory and nothing is copied. names: files and folders to
    fetch at the start, which an interrupted run left there.
    """

    def __init__(self, directory: Path, names: Collection[str] = ()):
        self.directory = directory
        if not is_remote(directory):
            self.local = directory
            return
        self.temporary = tempfile.TemporaryDirectory(prefix="omni2-run-")
        self.local = Path(self.temporary.name)
        for name in names:
            if (directory / name).exists():
                copy_files(directory, self.local, [directory / name])
        self.copied = {path: version(path) for path in files(self.local)}

    def push(self) -> None:
        """Copy what has changed since the last call, or since it was fetched."""
        if self.local == self.directory:
            return
        for path in list(files(self.local)):
            state = version(path)
            if self.copied.get(path) != state:
                copy_files(self.local, self.directory, [path])
                self.copied[path] = state


def version(path: Path) -> tuple[int, int]:
    """What changes when a local file is written: its size in bytes, and its time in ns."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns

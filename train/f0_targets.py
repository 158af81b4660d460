"""The fundamental frequency of all recorded replies of a data set: computed once, and kept beside
it in DATA/f0.npz.
"""

import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
import rich.progress

from omni2_jax import files
from omni2_jax.audio import pitch
from omni2_jax.console import console, say
from omni2_jax.train.data.dataset import Dataset, RecordError

FILE = "f0.npz"
VERSION = 1  # of pitch.py's method: another one makes stored values unusable


@dataclass(frozen=True)
class F0Targets:
    """F0 in Hz of clips, one after the other; 0 = unvoiced, and nothing for clips of questions.

    values: float32. starts [clips + 1]: where each clip's frames begin.
    """

    values: np.ndarray
    starts: np.ndarray

    def clip(self, index: int) -> np.ndarray:
        """F0 [T] of clip `index`, one for each of its mel frames."""
        return self.values[self.starts[index] : self.starts[index + 1]]


def of_dataset(data: Dataset) -> F0Targets:
    """Read them from DATA/f0.npz, or compute them and write it.

    A data set that cannot be written to gets no such file, and is computed anew by every run.
    """
    path = data.files / FILE
    stored = read(data)
    if stored is not None:
        return stored
    tracks: list[np.ndarray] = [np.zeros(0, np.float32)] * data.info.clips
    for index, track in compute(data):
        tracks[index] = track
    starts = np.cumsum([0, *map(len, tracks)])
    targets = F0Targets(np.concatenate(tracks), starts)
    try:
        with files.atomic_write(path, "wb") as file:
            np.savez(file, version=VERSION, values=targets.values, starts=starts)
    except (OSError, ValueError) as error:
        say(f"{path} cannot be written, the next run computes F0 again: {files.first_line(error)}")
    return targets


def read(data: Dataset) -> F0Targets | None:
    """What DATA/f0.npz holds; None if there is none, or if it does not fit."""
    try:
        with np.load(data.files / FILE, allow_pickle=False) as stored:
            targets = F0Targets(stored["values"], stored["starts"])
            fits = stored["version"] == VERSION and len(targets.starts) == data.info.clips + 1
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return targets if fits and targets.starts[-1] == len(targets.values) else None


def compute(data: Dataset) -> Iterator[tuple[int, np.ndarray]]:
    """(clip, F0 [T]) of every recorded reply. A damaged recording is left out."""

    def clips() -> Iterator[int]:
        for index in range(len(data)):
            try:
                replies = data.dialogue(index).replies.values()
            except RecordError:
                continue  # the run names it
            yield from (reply.clip for reply in replies if reply.clip is not None)

    def track(clip: int) -> tuple[int, np.ndarray]:
        try:
            return clip, pitch.f0(data.clip(clip))
        except RecordError:
            return clip, np.zeros(0, np.float32)

    work = list(clips())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from rich.progress.track(
            pool.map(track, work),
            f"fundamental frequency of {data.path}",
            total=len(work),
            console=console,
            disable=jax.process_index() != 0,
        )

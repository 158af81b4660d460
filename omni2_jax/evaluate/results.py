"""results.json: what was measured, and everything needed to measure it again."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni2_jax import __version__
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.files import atomic_write
from omni2_jax.validation import validated

FILE = "results.json"
PACKAGES = (
    *("jax", "jaxlib", "numpy", "scipy", "faster-whisper", "jiwer", "speechmos", "openai"),
    "whisper-normalizer",
)

Summary = dict[str, Estimate]  # by metric


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    settings: of the task. answers: how many were scored. left_out: how many were not, by reason.
    groups: by metadata key and value.
    """

    settings: dict[str, Any]
    answers: int
    left_out: dict[str, int]
    metrics: Summary
    groups: dict[str, dict[str, Summary]]


@dataclass(frozen=True)
class Results:
    """One system on one set of items.

    label: names the system in tables. dataset: names the items in tables. rows: of the paper's
    tables that this is a measurement of, as "table2/sum". notes: what a reader must know.
    """

    label: str
    dataset: str
    rows: list[str]
    system: dict[str, Any]
    data: dict[str, Any]
    recogniser: dict[str, Any] | None
    tasks: dict[str, TaskResult]
    notes: list[str]
    command: list[str]
    environment: dict[str, Any]

    def save(self, out: Path) -> None:
        """Write OUT/results.json, whole or not at all."""
        with atomic_write(out / FILE) as file:
            json.dump(dataclasses.asdict(self), file, indent=1, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a results.json. Raises ValueError, one line, with every fault."""
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        return validated(cls, content, f"{path} holds no results of `omni2 evaluate`")


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change numbers."""
    versions: dict[str, str] = {"omni2-jax": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def command() -> list[str]:
    """The command line of this process."""
    return ["omni2", *sys.argv[1:]]


def merged(new: Results, old: Results | None) -> Results:
    """Results with the tasks that an earlier command measured on the same answers.

    Its recogniser and its notes stay, too, if the new command has no recogniser.
    """
    if old is None or (old.system, old.data) != (new.system, new.data):
        return new
    if new.recogniser is None:
        notes = list(dict.fromkeys([*old.notes, *new.notes]))
        new = dataclasses.replace(new, recogniser=old.recogniser, notes=notes)
    return dataclasses.replace(new, tasks={**old.tasks, **new.tasks})


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as one line: "kind checkpoint, read 3, options (seed 0)"."""
    return ", ".join(
        f"{key} ({as_text(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in settings.items()
        if value is not None
    )

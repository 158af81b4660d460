"""The plots of a report, as PNG files. Published points are hollow, measured ones are filled."""

import contextlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.axes
import matplotlib.pyplot as plt
import numpy as np

from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.report.published import COLUMNS
from omni2_jax.evaluate.report.tables import MEASURED, PUBLISHED, Line, ReportTable

DPI = 120
LABEL_WIDTH = 26  # characters of a line
# What a run reports of itself and not of what it learns.
NOT_DRAWN = ("step", "terms", "rate", "tokens_per_s", "seconds", "data_wait", "damaged", "mfu")
PUBLISHED_COLOR, MEASURED_COLOR = "tab:gray", "tab:blue"


def draw(table: ReportTable, folder: Path) -> Path | None:
    """The plot of a table, NAME.png in `folder`; None if there is nothing to draw.

    Table 1 and table 4 have latency as the x axis where it was measured; the other tables, and
    those without latency, are bars.
    """
    against = "latency" in table.columns and any(
        line.origin == MEASURED and line.number("latency") is not None for line in table.lines
    )
    names = [
        name
        for name in table.columns
        if name != "latency"
        and any(line.origin == MEASURED and name in line.cells for line in table.lines)
    ]
    if not names:
        return None
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 4.5), squeeze=False, layout="constrained"
    )
    for name, ax in zip(names, axes[0], strict=True):
        (scatter if against else bars)(ax, table.lines, name)
        ax.set_title(f"{COLUMNS[name].title} ({COLUMNS[name].best} is better)", fontsize=9)
    figure.suptitle(f"{table.title}\nwhite: {PUBLISHED}, blue: {MEASURED}", fontsize=10)
    path = folder / f"{table.name}.png"
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def error(line: Line, name: str) -> list[list[float]] | None:
    """The 95 % interval of a measured number as matplotlib wants it; None for a published one."""
    cell = line.cells[name]
    if not isinstance(cell, Estimate):
        return None
    return [[max(0.0, cell.value - cell.low)], [max(0.0, cell.high - cell.value)]]


def scatter(ax: matplotlib.axes.Axes, lines: Sequence[Line], name: str) -> None:
    """A column against latency, one point a line."""
    for line in lines:
        x, y = line.number("latency"), line.number(name)
        if x is None or y is None:
            continue
        measured = line.origin == MEASURED
        color = MEASURED_COLOR if measured else PUBLISHED_COLOR
        ax.errorbar(
            x, y, error(line, name), fmt="o", color=color, mfc=color if measured else "white",
            capsize=2,
        )  # fmt: skip
        ax.annotate(line.row or line.label, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    ax.set_xlabel("time to first audio, ms")
    ax.set_xscale("log")
    ax.grid(alpha=0.3)


def bars(ax: matplotlib.axes.Axes, lines: Sequence[Line], name: str) -> None:
    """A column as bars, one for each line that has it."""
    present = [line for line in lines if line.number(name) is not None]
    for place, line in enumerate(present):
        value, measured = line.number(name), line.origin == MEASURED
        assert value is not None
        color = MEASURED_COLOR if measured else "white"
        ax.barh(
            place, value, color=color, edgecolor=PUBLISHED_COLOR, xerr=error(line, name), capsize=2
        )
    labels = [textwrap.fill(line.label, LABEL_WIDTH) for line in present]
    ax.set_yticks(range(len(present)), labels, fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)


def draw_groups(title: str, groups: Sequence[tuple[str, Estimate]], unit: str, path: Path) -> Path:
    """Bars of one metric for each value of a metadata key."""
    figure, ax = plt.subplots(figsize=(6, 1.2 + 0.3 * len(groups)), layout="constrained")
    for place, (_, value) in enumerate(groups):
        spread = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
        ax.barh(place, value.value, color=MEASURED_COLOR, xerr=spread, capsize=2)
    ax.set_yticks(range(len(groups)), [f"{name} ({value.count})" for name, value in groups])
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.set_title(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def draw_spectrograms(title: str, pictures: Mapping[str, np.ndarray], path: Path) -> Path:
    """Log-mels [T, M] at 50 frames a second, one above the other, in the same colours."""
    figure, axes = plt.subplots(
        len(pictures), 1, figsize=(9, 2 * len(pictures)), squeeze=False, layout="constrained"
    )
    low, high = np.percentile(next(iter(pictures.values())), [1, 99.5])
    for (name, mel), ax in zip(pictures.items(), axes[:, 0], strict=True):
        ax.imshow(
            mel.T, origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high,
            extent=(0, len(mel) / 50, 0, mel.shape[1]),
        )  # fmt: skip
        ax.set_ylabel(name)
    axes[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def metrics_of(run: Path) -> Path:
    """The metrics.jsonl of a training run. Raises ValueError if it has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} has no metrics.jsonl: expected a directory of `omni2 train`")
    return path


def curves(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The measurements in a metrics.jsonl by name: their steps and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            values = json.loads(line)
            for name, value in values.items():
                if name not in NOT_DRAWN:
                    steps, series = found.setdefault(name, ([], []))
                    steps.append(values["step"])
                    series.append(value)
    return found


def draw_run(run: Path, path: Path) -> Path:
    """The losses and other measurements of a training run, one panel each.

    Raises ValueError as `metrics_of`.
    """
    found = curves(metrics_of(run))
    columns = 3
    rows = max(1, math.ceil(len(found) / columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(found) :]:
        ax.set_axis_off()
    for (name, (steps, values)), ax in zip(found.items(), axes.flat, strict=False):
        ax.plot(steps, values, color=MEASURED_COLOR, lw=1, marker="." if len(steps) < 50 else "")
        ax.set_title(name.replace("_", " "), fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.3)
    figure.suptitle(run.name, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path

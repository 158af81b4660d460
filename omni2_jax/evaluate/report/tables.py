"""The tables of a report: published rows and measured ones, as Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.report.published import (
    COLUMNS,
    EXTRA,
    GRID_ROW,
    Column,
    Table,
    dataset_kind,
    noise_of,
    published,
)
from omni2_jax.evaluate.results import Results

PUBLISHED, MEASURED = "published", "measured here"


@dataclass(frozen=True)
class Line:
    """A row of a report's table.

    origin: PUBLISHED or MEASURED. cells: by the names of columns. datasets: those that a measured
    column is known of, by its name; the cell is of the first one.
    """

    label: str
    origin: str
    cells: Mapping[str, Estimate | float]
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    row: str = ""  # of the paper's table that it belongs to

    def number(self, column: str) -> float | None:
        cell = self.cells.get(column)
        return cell.value if isinstance(cell, Estimate) else cell


@dataclass(frozen=True)
class ReportTable:
    """A table with its lines. columns: names in COLUMNS that at least one line has."""

    name: str
    title: str
    columns: Sequence[str]
    lines: Sequence[Line]

    def markdown(self) -> str:
        """Numbers with their 95 % intervals and counts where they were measured."""
        heads = ["", "origin", *(COLUMNS[name].title for name in self.columns)]
        rows = [
            [line.label, line.origin, *(cell(line, COLUMNS[name], name) for name in self.columns)]
            for line in self.lines
        ]
        parts = [f"## {self.title}", markdown_table(heads, rows), *map(choice, self.lines)]
        return "\n\n".join(filter(None, parts)) + "\n"


def paper_tables(results: Sequence[Results]) -> list[ReportTable]:
    """Table 1 with every system that is no row of another table, and those tables that were
    measured."""
    tables = []
    for name, table in published().tables.items():
        measured = measured_lines(name, table, results)
        if measured:
            tables.append(report_table(name, table, measured))
    return tables


def measured_lines(name: str, table: Table, results: Sequence[Results]) -> list[Line]:
    """The measured lines of a table: one for each label and row, with a number at least.

    What was measured in noise has lines of its own.
    """
    chosen: dict[tuple[str, str], list[Results]] = {}
    for found in results:
        rows = [row.partition("/")[2] for row in found.rows if row.startswith(f"{name}/")]
        if name == "table1" and not found.rows:
            rows = [""]
        for row in rows:
            system = found.label + noise_of(found.dataset)
            chosen.setdefault((row, system), []).append(found)
    lines = [
        Line(label(table, name, row, system), MEASURED, *cells(group), row)
        for (row, system), group in chosen.items()
    ]
    return [line for line in lines if line.cells]


def label(table: Table, name: str, row: str, system: str) -> str:
    """What a measured line is called: the row of the paper, and the system."""
    known = table.row(row)
    if known is not None:
        return f"{known.label}: {system}" if name != "table1" else system
    pair = GRID_ROW.fullmatch(f"{name}/{row}")
    return f"R = {pair[1]}, W = {pair[2]}: {system}" if pair else system


def report_table(name: str, table: Table, measured: Sequence[Line]) -> ReportTable:
    """Published lines first, each followed by the measured lines of its row."""
    lines = []
    for row in table.rows:
        lines.append(Line(row.label, PUBLISHED, row.values, row=row.id))
        lines += [line for line in measured if line.row == row.id]
    placed = {id(line) for line in lines}
    lines += sorted((line for line in measured if id(line) not in placed), key=by_numbers)
    extra = [column for column in EXTRA if any(column in line.cells for line in measured)]
    return ReportTable(name, table.title, [*table.columns, *extra], lines)


def by_numbers(line: Line) -> list[int]:
    """Order lines by the numbers in their row: R, then W."""
    return [int(digits) for digits in re.findall(r"\d+", line.row)]


def cells(group: Sequence[Results]) -> tuple[dict[str, Estimate | float], dict[str, list[str]]]:
    """The numbers of one system by column, and the data sets that each column is known of."""
    found: dict[str, Estimate | float] = {}
    datasets: dict[str, list[str]] = {}
    # WER, naturalness and latency are the paper's on its instructions.
    ordered = sorted(group, key=lambda one: dataset_kind(one.dataset) != "instructions")
    for name, column in COLUMNS.items():
        for one in ordered:
            if column.dataset not in (None, dataset_kind(one.dataset)):
                continue
            task = one.tasks.get(column.task)
            if task and column.metric in task.metrics:
                found.setdefault(name, task.metrics[column.metric])
                datasets.setdefault(name, []).append(one.dataset)
    return found, datasets


def choice(line: Line) -> str:
    """Which data set's numbers a line shows, where a column is known of several; or ""."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, datasets in line.datasets.items():
        if len(datasets) > 1:
            columns.setdefault(tuple(datasets), []).append(COLUMNS[name].title)
    said = [
        f"{', '.join(titles)} on {first}; on {', '.join(others)}: see below"
        for (first, *others), titles in columns.items()
    ]
    return f"{line.label}: {'. '.join(said)}." if said else ""


def cell(line: Line, column: Column, name: str) -> str:
    """A number, with its interval and count if it was measured."""
    value = line.cells.get(name)
    if value is None:
        return "-"
    if not isinstance(value, Estimate):
        return f"{value:.{column.digits}f}"
    return shown(value, column.digits)


def shown(estimate: Estimate, digits: int) -> str:
    """A measured number: value [low, high] (count)."""
    value, low, high = (f"{x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"**{value}** [{low}, {high}] ({estimate.count})"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines
    )

"""The numbers of the paper's tables (published.json), and the columns that they stand in."""

import functools
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from omni2_jax.evaluate import report
from omni2_jax.validation import validated

GRID_ROW = re.compile(r"table4/(\d+)-(\d+)")  # any R and W can be measured


@dataclass(frozen=True)
class Row:
    """A row of a table. id: its name in `--row TABLE/ID`. values: by the names of columns."""

    id: str
    label: str
    values: dict[str, float]


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    columns: list[str]
    rows: list[Row]

    def row(self, id: str) -> Row | None:
        return next((row for row in self.rows if row.id == id), None)


@dataclass(frozen=True)
class Published:
    """All tables of a paper, by name."""

    source: str
    tables: dict[str, Table]


@dataclass(frozen=True)
class Column:
    """Where a column's numbers come from: a task's metric on a data set (None: on any)."""

    title: str
    task: str
    metric: str
    dataset: str | None = None
    digits: int = 2
    best: str = field(default="high")


COLUMNS = {
    "lq_s2t": Column("Llama Q. S2T", "spoken-qa", "s2t", "llama-questions", 1),
    "lq_s2s": Column("Llama Q. S2S", "spoken-qa", "s2s", "llama-questions", 1),
    "wq_s2t": Column("Web Q. S2T", "spoken-qa", "s2t", "web-questions", 1),
    "wq_s2s": Column("Web Q. S2S", "spoken-qa", "s2s", "web-questions", 1),
    "score_s2t": Column("score S2T", "instructions", "score_s2t"),
    "score_s2s": Column("score S2S", "instructions", "score_s2s"),
    "wer": Column("ASR-WER %", "asr-wer", "wer", best="low"),
    "utmos": Column("UTMOS", "naturalness", "utmos"),
    "latency": Column("latency ms", "latency", "first_audio", best="low"),
    # Measured beside the paper's columns.
    "qa_s2t": Column("QA S2T", "spoken-qa", "s2t", "other", 1),
    "qa_s2s": Column("QA S2S", "spoken-qa", "s2s", "other", 1),
    "dnsmos": Column("DNSMOS OVRL", "naturalness", "dnsmos_ovrl"),
    "real_time": Column("real-time factor", "latency", "real_time_factor", digits=3, best="low"),
}
EXTRA = ("qa_s2t", "qa_s2s", "dnsmos", "real_time")

# What the data sets of the paper are called in their files.
DATASETS = {
    "llama-questions": re.compile(r"llama.*q", re.IGNORECASE),
    "web-questions": re.compile(r"web.*q", re.IGNORECASE),
    "instructions": re.compile(r"alpaca|vicuna|instruct", re.IGNORECASE),
}


# What `omni2 evaluate --noise` adds to the name of a data set.
NOISE = re.compile(r"(, noise \S+ dB)?$")


def noise_of(name: str) -> str:
    """The end of a data set's name that states its noise; "" without noise."""
    found = NOISE.search(name)
    return found[0] if found else ""


def dataset_kind(name: str) -> str:
    """The data set of the paper that a name stands for; "other" for another one."""
    return next((kind for kind, pattern in DATASETS.items() if pattern.search(name)), "other")


@functools.cache
def published() -> Published:
    """The paper's tables."""
    file = importlib.resources.files(report) / "published.json"
    return validated(Published, file.read_text(encoding="utf-8"), file)


def check_rows(rows: Sequence[str]) -> None:
    """Raise ValueError for a row TABLE/ROW that no table of the paper has."""
    tables = published().tables
    for name in rows:
        table, _, row = name.partition("/")
        if table in tables and (tables[table].row(row) or GRID_ROW.fullmatch(name)):
            continue
        known = [f"{key}/{item.id}" for key, value in tables.items() for item in value.rows]
        raise ValueError(f"--row {name} is no row of the paper; expected one of {', '.join(known)}")

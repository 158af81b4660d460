"""Writing a report: report.md and its plots, from directories of `omni2 evaluate`."""

import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from omni2_jax.evaluate import results as result_files
from omni2_jax.evaluate.report import plots
from omni2_jax.evaluate.report.labels import told_apart, unused
from omni2_jax.evaluate.report.published import COLUMNS, published
from omni2_jax.evaluate.report.tables import markdown_table, paper_tables, shown
from omni2_jax.evaluate.results import Results, Summary, as_text
from omni2_jax.evaluate.tasks import task_class
from omni2_jax.files import atomic_write

MAIN = {column.metric for column in COLUMNS.values()}  # metrics that are shown by group
MEASURED_LEGEND = "Measured numbers are **value** [95 % interval] (count)."
LEGEND = (
    f"{MEASURED_LEGEND} Rows marked *published* are copied from the paper and were measured there, "
    "on other machines; rows marked *measured here* are this report's."
)


def read_results(folders: Sequence[Path]) -> dict[Path, Results]:
    """All results in or below the folders, by the directories that hold them.

    No label stands for two systems (`told_apart`). Raises ValueError for a folder without any.
    """
    found: dict[Path, Results] = {}
    for folder in folders:
        paths = sorted(folder.rglob(result_files.FILE)) if folder.is_dir() else []
        if not paths:
            raise ValueError(f"{folder} holds no {result_files.FILE} of `omni2 evaluate`")
        for path in paths:
            found.setdefault(path.resolve().parent, Results.load(path))
    return dict(zip(found, told_apart(list(found.values())), strict=True))


def write_report(folders: Sequence[Path], out: Path, runs: Sequence[Path] = ()) -> Path:
    """Write OUT/report.md and its plots -> its path. An earlier report in OUT is replaced.

    runs: directories of `omni2 train`, the curves of which are drawn. Raises ValueError for folders
    without results, and for runs without metrics, before anything is written.
    """
    found = read_results(folders)
    results = list(found.values())
    for run in runs:
        plots.metrics_of(run)
    out.mkdir(parents=True, exist_ok=True)
    tables = paper_tables(results)
    parts = ["# Evaluation", LEGEND if tables else MEASURED_LEGEND]
    for table in tables:
        parts.append(table.markdown())
        picture = plots.draw(table, out)
        if picture:
            parts.append(f"![{table.title}]({picture.name})")
    parts += ["## Everything measured", everything(results)]
    parts += group_sections(results, out)
    parts += spectrograms(found, out)
    for number, run in enumerate(runs):
        picture = plots.draw_run(run, out / f"run-{number}-{run.name}.png")
        parts.append(f"## Training: {run.name}\n\n![{run.name}]({picture.name})")
    parts += ["## How it was measured", *map(provenance, results)]
    if tables:
        parts.append(f"Source of the published numbers: {published().source}")
    path = out / "report.md"
    with atomic_write(path) as file:
        file.write("\n\n".join(part.strip() for part in parts) + "\n")
    return path


def spectrograms(results: Mapping[Path, Results], out: Path) -> list[str]:
    """The pictures that copy syntheses drew, copied to the report, each below its evaluation."""
    parts: list[str] = []
    drawn = {folder: sorted(folder.glob("copies/*.png")) for folder in results}
    for number, folder in enumerate(folder for folder in drawn if drawn[folder]):
        parts.append(f"### {results[folder].label} on {results[folder].dataset}")
        for picture in drawn[folder]:
            name = f"copy-{number}-{picture.name}"
            shutil.copyfile(picture, out / name)
            parts.append(f"![{picture.stem}]({name})")
    return ["## Recordings and their copies", *parts] if parts else []


def everything(results: Sequence[Results]) -> str:
    """Every metric of every task, one row each."""
    rows = []
    for found in results:
        for task, one in found.tasks.items():
            metrics = task_class(task).metrics
            for name, estimate in one.metrics.items():
                metric = metrics[name]
                title = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
                numbers = shown(estimate, metric.digits)
                rows.append([found.label, found.dataset, task, title, numbers])
    return markdown_table(["system", "data set", "task", "measure", "value"], rows)


def group_sections(results: Sequence[Results], out: Path) -> list[str]:
    """The main metrics of each task for each value of the items' metadata."""
    parts: list[str] = []
    taken: set[str] = set()  # names of plots
    for found in results:
        for task, one in found.tasks.items():
            names = [name for name in task_class(task).metrics if name in one.metrics]
            for key, values in one.groups.items():
                shown_names = [name for name in names if name in MAIN]
                parts += group_section(found, task, key, values, shown_names, out, taken)
    return ["## By group", *parts] if parts else []


def group_section(
    found: Results,
    task: str,
    key: str,
    values: Mapping[str, Summary],
    names: Sequence[str],
    out: Path,
    taken: set[str],
) -> list[str]:
    """The metrics `names` of a task by a metadata key: a table, and a plot of the last of them.

    taken: names of plots that there are already; this one is added.
    """
    rows = {value: summary for value, summary in values.items() if set(names) <= set(summary)}
    if len(rows) < 2 or not names:
        return []
    metrics = task_class(task).metrics
    title = f"{found.label} on {found.dataset}, {task} by {key}"
    cells = [
        [value, *(shown(summary[name], metrics[name].digits) for name in names)]
        for value, summary in rows.items()
    ]
    last = metrics[names[-1]]
    stem = re.sub(r"[^\w.-]+", "-", f"{found.label}-{found.dataset}-{task}-{key}")
    numbered = (f"{stem}-{count}.png" for count in itertools.count(2))
    file = unused(itertools.chain([f"{stem}.png"], numbered), taken)
    bars = [(value, summary[names[-1]]) for value, summary in rows.items()]
    plots.draw_groups(title, bars, f"{last.title} {last.unit}", out / file)
    table = markdown_table([key, *(metrics[name].title for name in names)], cells)
    return [f"### {title}", table, f"![{title}]({file})"]


def provenance(found: Results) -> str:
    """What is needed to repeat one evaluation."""
    recogniser = as_text(found.recogniser) if found.recogniser else "none"
    lines = [
        f"### {found.label} on {found.dataset}",
        f"- system: {as_text(found.system)}",
        f"- items: {as_text(found.data)}",
        f"- recogniser: {recogniser}",
        f"- command: `{' '.join(found.command)}`",
        f"- machine: {as_text(found.environment)}",
        *(f"- note: {note}" for note in found.notes),
    ]
    return "\n".join(lines)

"""From the settings of a command to evaluations: one, or one for each R and W of a grid."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omni2_jax.cli.console import say
from omni2_jax.evaluate.items import Item, read_items
from omni2_jax.evaluate.recognisers import Recogniser, RecogniserOptions, open_recogniser
from omni2_jax.evaluate.report import published
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.run import Evaluation
from omni2_jax.evaluate.systems import SystemOptions, open_system
from omni2_jax.evaluate.tasks import TaskOptions, open_task


@dataclass(frozen=True)
class Settings:
    """What `omni2 evaluate` was told. limit: of items. label, dataset, rows: see `Results`."""

    tasks: tuple[str, ...]
    system: str
    data: Path
    out: Path
    system_options: SystemOptions = field(default_factory=SystemOptions)
    task_options: TaskOptions = field(default_factory=TaskOptions)
    recogniser: str | None = None
    recogniser_options: RecogniserOptions = field(default_factory=RecogniserOptions)
    limit: int | None = None
    label: str | None = None
    dataset: str | None = None
    rows: tuple[str, ...] = ()


def measure(settings: Settings, grid: Sequence[tuple[int, int]] | None = None) -> Iterator[Results]:
    """The results of each evaluation, when it is complete.

    grid: pairs of R and W to measure a checkpoint with, each in a directory of its own; they are
    rows of the paper's table 4. Raises ValueError, one line, for bad settings and data, before
    anything is answered where that can be known.
    """
    published.check_rows(settings.rows)
    tasks = {name: open_task(name, settings.task_options) for name in settings.tasks}
    points = [settings] if grid is None else [at(settings, *pair) for pair in grid]
    systems = [open_system(point.system, point.system_options) for point in points]
    recogniser = None
    if settings.recogniser and any(task.needs_transcript for task in tasks.values()):
        recogniser = open_recogniser(settings.recogniser, settings.recogniser_options)
    items = read_items(settings.data, settings.limit, settings.out / "questions")
    for point, system in zip(points, systems, strict=True):
        if grid is not None:
            say(f"read {point.system_options.read}, write {point.system_options.write}")
        yield evaluation(point, system, tasks, items, recogniser).run()


def evaluation(point: Settings, system, tasks, items: list[Item], recogniser: Recogniser | None):
    """One evaluation of settings whose parts are open."""
    name = str(system.describe().get("name", point.system))
    return Evaluation(
        system=system,
        items=items,
        tasks=tasks,
        recogniser=recogniser,
        out=point.out,
        name=point.data.name,
        label=point.label or name,
        dataset=point.dataset or point.data.stem,
        rows=point.rows,
    )


def at(settings: Settings, read: int, write: int) -> Settings:
    """The settings of one point of a grid."""
    options = dataclasses.replace(settings.system_options, read=read, write=write)
    given = [row for row in settings.rows if row.startswith("table4/")]
    rows = settings.rows if given else (*settings.rows, f"table4/{read}-{write}")
    return dataclasses.replace(
        settings,
        system_options=options,
        out=settings.out / f"read{read}-write{write}",
        rows=rows,
    )

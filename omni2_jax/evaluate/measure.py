"""From the settings of a command to evaluations: one, or one for each R and W of a grid."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omni2_jax import remote
from omni2_jax.console import say
from omni2_jax.evaluate.items import Item, read_items
from omni2_jax.evaluate.noise import in_noise
from omni2_jax.evaluate.report import published
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.run import Evaluation
from omni2_jax.evaluate.systems import System, SystemOptions, open_system
from omni2_jax.evaluate.tasks import Task, TaskOptions, open_task
from omni2_jax.recognisers import Recogniser, RecogniserOptions, open_recogniser

COPIES = "copy-synthesis"


@dataclass(frozen=True)
class Settings:
    """What `omni2 evaluate` was told.

    limit, split, every_turn: see `read_items`. noise: the ratio of `in_noise`. seed: of the noise.
    label, dataset, rows: see `Results`. by: keys of items that groups take together, as
    "split+voices".
    """

    tasks: tuple[str, ...]
    system: str
    data: Path
    out: Path
    system_options: SystemOptions = field(default_factory=SystemOptions)
    task_options: TaskOptions = field(default_factory=TaskOptions)
    recogniser: str | None = None
    recogniser_options: RecogniserOptions = field(default_factory=RecogniserOptions)
    limit: int | None = None
    split: str | None = None
    every_turn: bool = False
    noise: float | None = None
    seed: int = 0
    label: str | None = None
    dataset: str | None = None
    rows: tuple[str, ...] = ()
    by: tuple[str, ...] = ()


def measure(settings: Settings, grid: Sequence[tuple[int, int]] | None = None) -> Iterator[Results]:
    """The results of each evaluation, when it is complete.

    grid: pairs of R and W to measure a checkpoint with, each in a directory of its own; they are
    rows of the paper's table 4. Raises ValueError, one line, for bad settings and data, before
    anything is answered where that can be known.
    """
    published.check_rows(settings.rows)
    tasks = {name: open_task(name, settings.task_options) for name in settings.tasks}
    if not settings.system_options.speech:
        check_text_only(tasks)
    points = [settings] if grid is None else [at(settings, *pair) for pair in grid]
    systems = [open_measured(point) for point in points]
    recogniser = None
    hears = any(task.needs_transcript or task.hears for task in tasks.values())
    if settings.recogniser and hears:
        recogniser = open_recogniser(settings.recogniser, settings.recogniser_options)
        for task in tasks.values():
            task.recogniser = recogniser
    questions = settings.out / "questions"
    items = read_items(
        settings.data, settings.limit, questions, settings.split, settings.every_turn
    )
    if settings.noise is not None:
        folder = questions / f"noise-{settings.noise:g}"
        items = in_noise(items, settings.noise, settings.seed, folder)
    for point, system in zip(points, systems, strict=True):
        if grid is not None:
            say(f"read {point.system_options.read}, write {point.system_options.write}")
        yield evaluation(point, system, tasks, items, recogniser).run()


def check_text_only(tasks: Mapping[str, Task]) -> None:
    """Raise ValueError if a task measures speech, which answers in text alone do not have."""
    for name, task in tasks.items():
        if task.needs_samples or task.needs_transcript or task.needs_times:
            raise ValueError(f"the task {name} measures speech, which --text-only leaves out")


def open_measured(point: Settings) -> System:
    """The system; for copy synthesis the recordings, which the task copies with the checkpoint.

    Raises ValueError if there is no such system, or for other tasks beside copy synthesis.
    """
    if COPIES not in point.tasks:
        return open_system(point.system, point.system_options)
    if len(point.tasks) > 1:
        raise ValueError(f"the task {COPIES} copies recordings, other tasks measure answers")
    from omni2_jax.evaluate.systems.recordings import Recordings

    return Recordings(remote.as_path(point.system))


def evaluation(point: Settings, system, tasks, items: list[Item], recogniser: Recogniser | None):
    """One evaluation of settings whose parts are open."""
    label = point.label or str(system.describe().get("name", point.system))
    dataset = point.dataset or point.data.stem
    if point.noise is not None:
        dataset += f", noise {point.noise:g} dB"
    options = point.system_options
    if options.read:  # one of a grid, which otherwise could not be told from the others
        label += f" R{options.read} W{options.write}"
    return Evaluation(
        system=system,
        items=items,
        tasks=tasks,
        recogniser=recogniser,
        out=point.out,
        name=point.data.name,
        label=label,
        dataset=dataset,
        rows=point.rows,
        by=point.by,
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

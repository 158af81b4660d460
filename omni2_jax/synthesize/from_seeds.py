"""What `omni2 synthesize dialogues` does with seeds and a chat model."""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from omni2_jax import files
from omni2_jax.console import say
from omni2_jax.endpoints import Client, Endpoint
from omni2_jax.jobs import Item, Job, Results, Where
from omni2_jax.synthesize.dialogue_writer import DialogueWriter, WriterSettings
from omni2_jax.synthesize.seeds import read_seeds


def from_seeds(
    paths: Sequence[Path],
    count: int | None,
    endpoint: Endpoint,
    settings: WriterSettings,
    where: Where,
    out: Path,
) -> None:
    """Write a dialogue for each of the first `count` seeds (None: all) to `out`.

    What is finished is kept in a directory beside `out`, from which the same command goes on.
    Raises ValueError if the seeds cannot be read, `out` is of another command or the work was begun
    with other settings; EndpointError or AnswerError if the server cannot be used.
    """
    work = out.with_name(f"{out.name}.work")
    if out.exists() and not work.exists():
        raise ValueError(f"{out} exists, and was not made by this command; give a new file")
    # What can be wrong is found before anything is written or shown.
    next(read_seeds(paths))
    if not work.exists() and where.ray is None:
        Client(endpoint).check()
    make = functools.partial(DialogueWriter, endpoint, settings, work / "answers")
    header = {"model": endpoint.model, **settings.as_header()}
    job = Job("dialogues", work, header, make, workers=16, cpus=0.1)
    results = job.run(seed_items(paths, count), where, count)
    if results is not None:
        write(results, out)
        shutil.rmtree(work / "answers", ignore_errors=True)  # the journal holds them all


def seed_items(paths: Sequence[Path], count: int | None) -> Iterator[Item]:
    """The seeds as the items of a job."""
    for seed in itertools.islice(read_seeds(paths), count):
        payload = {"key": seed.key, "text": seed.text, "fault": seed.fault}
        yield Item(seed.key, payload, share=seed.share)


def write(results: Results, out: Path) -> None:
    """Write the dialogues to `out`, in the order of their seeds, and say what was refused."""
    turns = shortened = 0
    with files.atomic_write(out) as file:
        for outcome in results.accepted():
            dialogue = outcome.value["dialogue"]
            file.write(json.dumps(dialogue, ensure_ascii=False) + "\n")
            turns += len(dialogue["turns"])
            shortened += bool(outcome.value["shortened"])
    say(f"{results.summary()}; {turns:,} turns; {shortened:,} dialogues end early")

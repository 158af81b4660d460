"""One evaluation: a system answers items, a recogniser hears the answers, tasks score them.

    OUT/answers/       journal and wav/NAME.wav: what the system answered
    OUT/transcripts/   what the recogniser heard of it
    OUT/TASK/          the scores of each answer
    OUT/items.jsonl    all of this, one item a line
    OUT/results.json   the summary (results.py)

Each step goes on where it was interrupted (omni2_jax/jobs). Other settings than the directory was
begun with are refused.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.console import say
from omni2_jax.evaluate import results
from omni2_jax.evaluate.items import Item, digest, groups
from omni2_jax.evaluate.results import Results, TaskResult
from omni2_jax.evaluate.systems import SpokenAnswer, System
from omni2_jax.evaluate.tasks import Heard, Scores, Task
from omni2_jax.files import atomic_write
from omni2_jax.recognisers import Recogniser

TRIED = 3  # questions that a recogniser is tried with before anything else is done


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured.

    name: of the items' file. label, dataset, rows: see `Results`. by: keys of items by which
    results are also given together (`items.groups`).
    """

    system: System
    items: Sequence[Item]
    tasks: Mapping[str, Task]
    recogniser: Recogniser | None
    out: Path
    name: str
    label: str
    dataset: str
    rows: Sequence[str] = ()
    by: Sequence[str] = ()

    def run(self) -> Results:
        """Measure, write results.json, and return the results.

        Raises ValueError, one line, for what the system or a task cannot use, and if the directory
        was begun with other settings.
        """
        self.check()
        answers = self.answer()
        transcripts = self.transcribe(answers) if self.recogniser else {}
        scores = {
            name: self.score(name, task, answers, transcripts) for name, task in self.tasks.items()
        }
        self.write_items(answers, transcripts, scores)
        path = self.out / results.FILE
        old = Results.load(path) if path.exists() else None
        found = results.merged(self.summary(answers, transcripts, scores), old)
        found.save(self.out)
        return found

    def check(self) -> None:
        """Raise ValueError for what can be known to fail before any answer."""
        groups(self.items, self.by)
        for task in self.tasks.values():
            task.check(self.items)
        self.system.check(self.items)
        if self.needs_transcripts and self.recogniser is None:
            names = [name for name, task in self.tasks.items() if task.needs_transcript]
            raise ValueError(f"the task {names[0]} needs a recogniser: give --recogniser")
        if self.needs_transcripts and self.recogniser:
            check_hears(self.recogniser, self.items)

    @property
    def needs_transcripts(self) -> bool:
        return any(task.needs_transcript for task in self.tasks.values())

    # ---- the three steps ----

    def answer(self) -> dict[str, dict[str, Any]]:
        """The answers by the names of their items; items without one are missing."""
        settings = {"system": self.system.describe()}
        make = functools.partial(answerer, self.system)
        job = jobs.Job("answers", self.out / "answers", settings, make, self.system.workers)
        items = [jobs.Item(item.name, item, digest(item)) for item in self.items]
        return outcomes(job.run(items, total=len(items)))

    def transcribe(self, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """What the recogniser heard, by the names of the items; "" of an answer without speech."""
        assert self.recogniser
        make = functools.partial(transcriber, self.recogniser, self.out / "answers")
        job = jobs.Job(
            "transcripts",
            self.out / "transcripts",
            {"recogniser": self.recogniser.describe()},
            make,
            self.recogniser.workers,
        )
        items = [
            jobs.Item(name, {"wav": answer["wav"], "sha256": answer["sha256"]})
            for name, answer in answers.items()
        ]
        return outcomes(job.run(items, total=len(items)))

    def score(
        self,
        name: str,
        task: Task,
        answers: Mapping[str, Mapping[str, Any]],
        transcripts: Mapping[str, str],
    ) -> dict[str, Scores]:
        """The scores of a task, by the names of the items."""
        known = {item.name: item for item in self.items}
        make = functools.partial(scorer, task, known, self.out / "answers")
        job = jobs.Job(f"scores of {name}", self.out / name, task.describe(), make, task.workers)
        items = [
            jobs.Item(
                item.name,
                {
                    "item": item.name,
                    "answer": answers[item.name],
                    "transcript": transcripts.get(item.name) if task.needs_transcript else None,
                    "about": [item.question, item.references, item.reply],
                },
            )
            for item in self.items
            if item.name in answers and not (task.needs_transcript and item.name not in transcripts)
        ]
        return outcomes(job.run(items, total=len(items)))

    # ---- what is written ----

    def write_items(self, answers, transcripts, scores) -> None:
        """Write items.jsonl: what a person looks at."""
        with atomic_write(self.out / "items.jsonl") as file:
            for item in self.items:
                line: dict[str, Any] = {"id": item.name, "question": item.question}
                line |= {"answers": item.references, **item.metadata}
                if item.name in answers:
                    answer = answers[item.name]
                    wav = answer["wav"] and f"answers/{answer['wav']}"
                    line |= {"text": answer["text"], "wav": wav}
                    line["transcript"] = transcripts.get(item.name)
                    line["scores"] = {name: rows.get(item.name) for name, rows in scores.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def summary(self, answers, transcripts, scores) -> Results:
        """The results of this command."""
        names = [item.name for item in self.items]
        known, tasks = dict(zip(names, self.items, strict=True)), {}
        for name, task in self.tasks.items():
            rows = scores[name]
            unanswered = {
                "no answer": len([n for n in names if n not in answers]),
                "not scored": len([n for n in names if n in answers and n not in rows]),
            }
            tasks[name] = TaskResult(
                settings=task.describe(),
                answers=len(rows),
                left_out={reason: count for reason, count in unanswered.items() if count},
                metrics=summarise(task, rows, self.items, answers),
                groups={
                    key: {
                        value: summarise(task, rows, [known[name] for name in group], answers)
                        for value, group in values.items()
                    }
                    for key, values in groups(self.items, self.by).items()
                },
            )
        content = hashlib.sha256("".join(map(digest, self.items)).encode()).hexdigest()
        return Results(
            label=self.label,
            dataset=self.dataset,
            rows=list(self.rows),
            system=self.system.describe(),
            data={"name": self.name, "items": len(names), "sha256": content},
            recogniser=self.recogniser.describe() if self.recogniser else None,
            tasks=tasks,
            notes=self.notes(answers, transcripts),
            command=results.command(),
            environment=results.environment(),
        )

    def notes(self, answers, transcripts) -> list[str]:
        """What a reader of the numbers must know."""
        notes = []
        if len(answers) < len(self.items):
            notes.append(f"{len(self.items) - len(answers)} of {len(self.items)} have no answer")
        silent = sum(answer["wav"] is None for answer in answers.values())
        if silent:
            notes.append(f"{silent} of {len(answers)} answers have no speech")
        if self.needs_transcripts and silent < len(answers) and not any(transcripts.values()):
            notes.append(f"the recogniser heard nothing in any of the {len(answers)} answers")
        for note in notes:
            say(f"note: {note}")
        return notes


def summarise(
    task: Task, scores: Mapping[str, Scores], items: Sequence[Item], answers: Mapping[str, Any]
) -> results.Summary:
    """The metrics of a task over some of the items."""
    rows = [scores[item.name] for item in items if item.name in scores]
    return task.summarise(rows, [item for item in items if item.name not in answers])


def check_hears(recogniser: Recogniser, items: Sequence[Item]) -> None:
    """Raise ValueError if a recogniser hears nothing in questions, which are speech."""
    spoken = [item for item in items if item.question.strip()] or list(items)
    for item in spoken[:TRIED]:
        samples = recordings.load(item.turns[-1], recordings.INPUT_RATE)
        if recogniser.transcribe(samples, recordings.INPUT_RATE):
            return
    raise ValueError(
        f"the recogniser hears nothing in the first {len(spoken[:TRIED])} questions: is it the "
        f"right model, and are they speech? ({spoken[0].context})"
    )


def outcomes(found: jobs.Results | None) -> dict[str, Any]:
    """The values of accepted outcomes by key; refusals are told to the user."""
    assert found is not None, "an evaluation has one shard"
    if found.refused:
        say(found.summary())
    return {outcome.key: outcome.value for outcome in found.accepted()}


# ---- the functions of the jobs ----


def answerer(system: System) -> Callable[[Item], jobs.Result]:
    """The function from an item to its answer and the answer's wav."""
    answer_item = system.open()

    def work(item: Item) -> jobs.Result:
        answer = answer_item(item)
        content = wav(answer)
        name = f"wav/{item.name}.wav" if content else None
        value = {
            "text": answer.text,
            "wav": name,
            "sha256": hashlib.sha256(content).hexdigest() if content else None,
            "seconds": dict(answer.seconds),
        }
        return jobs.Result(value, {name: content} if name and content else {})

    return work


def wav(answer: SpokenAnswer) -> bytes | None:
    """The speech of an answer as a 16-bit wav; None without speech."""
    if answer.samples is None or not answer.samples.size:
        return None
    return recordings.wav_bytes(answer.samples, answer.rate)


def load_wav(answers: Path, name: str | None) -> tuple[np.ndarray, int]:
    """Samples [N] and rate of a stored answer; no samples for an answer without speech."""
    if name is None:
        return np.zeros(0, np.float32), recordings.OUTPUT_RATE
    rate = soundfile.info(answers / name).samplerate
    return recordings.load(answers / name, rate), rate


def transcriber(recogniser: Recogniser, answers: Path) -> Callable[[Any], jobs.Result]:
    """The function from a stored answer to its transcript."""

    def work(payload: Mapping[str, Any]) -> jobs.Result:
        samples, rate = load_wav(answers, payload["wav"])
        if not samples.size:
            return jobs.Result("")
        try:
            return jobs.Result(recogniser.transcribe(samples, rate))
        except ValueError as error:
            raise jobs.Refused("not recognised", f"{payload['wav']}: {error}") from None

    return work


def scorer(task: Task, items: Mapping[str, Item], answers: Path) -> Callable[[Any], jobs.Result]:
    """The function from a stored answer and its transcript to its scores."""
    score = task.open()

    def work(payload: Mapping[str, Any]) -> jobs.Result:
        answer = payload["answer"]
        samples, rate = np.zeros(0, np.float32), recordings.OUTPUT_RATE
        if task.needs_samples or task.needs_times:
            samples, rate = load_wav(answers, answer["wav"])
        heard = Heard(answer["text"], samples, rate, payload["transcript"], answer["seconds"])
        return jobs.Result(score(items[payload["item"]], heard))

    return work

"""The tasks. To add one: a file with a subclass of `Task` (base.py), and its line in `TASKS`."""

import pkgutil

from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task, TaskOptions

__all__ = ["TASKS", "Heard", "Metric", "Scores", "Task", "TaskOptions", "open_task", "task_class"]

# Name on the command line -> class. As text, so that a task's libraries are imported if it is used.
TASKS = {
    "spoken-qa": "omni2_jax.evaluate.tasks.spoken_qa:SpokenQA",
    "text-qa": "omni2_jax.evaluate.tasks.text_qa:TextQA",
    "instructions": "omni2_jax.evaluate.tasks.instructions:Instructions",
    "asr-wer": "omni2_jax.evaluate.tasks.asr_wer:AsrWer",
    "naturalness": "omni2_jax.evaluate.tasks.naturalness:Naturalness",
    "copy-synthesis": "omni2_jax.evaluate.tasks.copy_synthesis:CopySynthesis",
    "latency": "omni2_jax.evaluate.tasks.latency:Latency",
}


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name}; expected one of {', '.join(TASKS)}")
    return pkgutil.resolve_name(TASKS[name])


def open_task(name: str, options: TaskOptions) -> Task:
    """A task with its settings. Raises ValueError if it is unknown or lacks a setting."""
    return task_class(name)(options)

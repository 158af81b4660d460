"""Systems that can be measured: a checkpoint, a folder of answers, an endpoint."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omni2_jax.evaluate.systems.base import SpokenAnswer, System
from omni2_jax.generate.options import Options
from omni2_jax.validation import validated

__all__ = ["SpokenAnswer", "System", "SystemOptions", "open_system", "parse_options"]


@dataclass(frozen=True)
class SystemOptions:
    """How a system is asked. A setting that a system does not have is ignored by it.

    batch: questions answered at the same time. timed: measure times, one question after the other.
    mesh: the devices that share a checkpoint, as "tensor=4". read, write: of the read/write rule
    instead of the checkpoint's. speech: False lets a checkpoint answer in text alone. model, voice,
    key_variable: of an endpoint, its model's name, its voice, and the environment variable with its
    key.
    """

    batch: int = 8
    timed: bool = False
    voice: str | None = None
    mesh: str | None = None
    read: int | None = None
    write: int | None = None
    speech: bool = True
    options: Options = field(default_factory=Options)
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"


def open_system(name: str, options: SystemOptions) -> System:
    """The system that `--system` names: a URL, a checkpoint directory or a folder of answers.

    Nothing large is loaded. Raises ValueError if there is no such system.
    """
    from omni2_jax import remote

    is_url = name.startswith(("http://", "https://"))
    if not is_url and ((path := remote.as_path(name)) / "config.json").exists():
        from omni2_jax.evaluate.systems.checkpoint import CheckpointSystem

        return CheckpointSystem(path, options)
    if not is_url and not Path(name).is_dir():
        raise ValueError(
            f"{name} is no system: expected a checkpoint, a folder of answers, or a URL"
        )
    if not options.speech:
        raise ValueError(f"{name} is no checkpoint, which --text-only needs")
    if options.read or options.write:
        raise ValueError(f"{name} is no checkpoint, which --read and --write need")
    if is_url:
        from omni2_jax.evaluate.systems.endpoint import EndpointSystem

        return EndpointSystem(name, options)
    if options.timed:
        raise ValueError(
            f"{name} is a folder of answers, whose times cannot be measured any more: the task "
            "latency needs a checkpoint or an endpoint"
        )
    from omni2_jax.evaluate.systems.folder import AnswersFolder

    return AnswersFolder(Path(name))


def parse_options(texts: Sequence[str], seed: int) -> Options:
    """The options of an answer from texts NAME=VALUE. Raises ValueError naming what is wrong."""
    known = {field.name for field in dataclasses.fields(Options)}
    values: dict[str, object] = {"seed": seed}
    for text in texts:
        name, is_pair, value = text.partition("=")
        if not is_pair or name not in known:
            raise ValueError(f"--option {text!r}: expected NAME=VALUE, with one of {sorted(known)}")
        values[name] = None if value.lower() == "none" else value
    return validated(Options, values, "--option")

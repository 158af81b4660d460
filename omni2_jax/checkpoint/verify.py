"""Read everything that a checkpoint holds, and name what is damaged."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from flax import nnx

from omni2_jax.checkpoint import generation_config, parameters, tokenizer, voices
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import Omni2Config
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.model import abstract_state


def list_arrays(directory: Path) -> tuple[list[LazyArray], list[str]]:
    """All parameters of a checkpoint, and a line for each part that cannot be listed."""
    arrays, faults = [], []
    for part in parameters.parts(directory):
        try:
            arrays += parameters.stored(directory, part).values()
        except ValueError as error:
            faults.append(str(error))
    return arrays, faults


def damaged_arrays(arrays: list[LazyArray], advance: Callable[[LazyArray], None]) -> Iterator[str]:
    """Read parameters, one in memory at a time; yield a line for each that is damaged.

    advance: called after each parameter, for a progress bar.
    """
    for array in arrays:
        try:
            array.read()
        except ValueError as error:
            yield str(error)
        advance(array)


def damaged_files(directory: Path) -> Iterator[str]:
    """Yield a line for each configuration, tokenizer and voice that is damaged, for each part whose
    parameters do not fit the configuration, and for the parts that have none."""
    try:
        config = Omni2Config.load(directory / "config.json")
    except ValueError as error:
        yield str(error)
        return
    shapes = nnx.to_pure_dict(abstract_state(config)[1])
    checks: list[Callable[[], object]] = [
        partial(parameters.check_parts, directory, shapes),
        partial(generation_config.load, directory),
        partial(check_text_tokenizer, directory / "tokenizer", config),
    ]
    for part in parameters.parts(directory):
        if part == "speech_tokenizer":
            checks.append(partial(check_speech_tokenizer, directory))
        else:
            expected = parameters.flatten(shapes.get(part, {}))
            checks.append(partial(parameters.check, directory, part, expected))
    if (directory / "tts_tokenizer").exists():
        checks.append(partial(tokenizer.load, directory / "tts_tokenizer"))
    checks += [
        partial(voices.load, directory / "voices" / f"{name}.npy", config)
        for name in voices.names(directory)
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def check_text_tokenizer(directory: Path, config: Omni2Config) -> None:
    """Raise ValueError unless the text tokenizer in a directory can be used.

    Only an LLM needs it, and its chat template.
    """
    if config.llm:
        tokenizer.check_chat_template(tokenizer.load(directory), directory)
    elif directory.exists():
        tokenizer.load(directory)


def check_speech_tokenizer(directory: Path) -> None:
    """Raise ValueError unless the speech tokenizer's parameters fit its configuration."""
    _, shapes = speech_tokenizer.abstract(speech_tokenizer.load_config(directory))
    parameters.check(directory, "speech_tokenizer", parameters.flatten(shapes))

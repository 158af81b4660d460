"""A `Release` -> a checkpoint directory, new or extended."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omni2_jax import files
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import PARTS, Omni2Config
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.release import Release, combine
from omni2_jax.models import speech_tokenizer

Written = Callable[[LazyArray], None]  # called with every parameter that has been written


def ignore(_: LazyArray) -> None:
    pass


def write(
    out: Path, release: Release, prompts: Mapping[str, Path], written: Written = ignore
) -> None:
    """Make the checkpoint `out`, whole or not at all.

    prompts: voice name -> a prompt's sound file, or a .npy x-vector.
    Raises ValueError if `out` exists or cannot be written, or if a prompt is not usable.
    """
    with files.atomic_directory(out) as partial:
        write_into(partial, release, prompts, written)


def extend(
    out: Path, release: Release | None, prompts: Mapping[str, Path], written: Written = ignore
) -> None:
    """Add parts that the checkpoint `out` lacks, and voices.

    Its config.json is replaced last. If anything fails before, no new file stays; a voice or a file
    that was to be replaced may be the new one already.
    Raises ValueError if it has one of the parts already, cannot be written, or if a prompt is not
    usable.
    """
    config = Omni2Config.load(out / "config.json")
    release = release or Release(config)
    present = Release(config, {part: {} for part in present_parts(out, config)})
    if twice := [part for part in present.params if part in release.params]:
        raise ConversionError(f"{out} has {', '.join(twice)} already; convert into a new directory")
    whole = combine([present, release])
    new = {part: params for part, params in whole.params.items() if part not in present.params}
    release = dataclasses.replace(whole, params=new)
    voice_files = [f"voices/{name}.npy" for name in (*release.voices, *prompts)]
    paths = [out / name for name in (*release.files, *voice_files)]
    added = [path for path in paths if not path.exists()]
    try:
        remove_parts(out, release)  # left behind by a conversion that was killed
        write_into(out, release, prompts, written)
    except BaseException:
        remove_parts(out, release)
        remove_files(added)
        raise


def present_parts(directory: Path, config: Omni2Config) -> list[str]:
    """The parts of a checkpoint. A fusion has no configuration; it is part of it with both LMs."""
    parts = [part for part in PARTS if getattr(config, part, config.llm and config.speech_lm)]
    tokenizer = (directory / speech_tokenizer.FILE).exists()
    return [*parts, "speech_tokenizer"] if tokenizer else parts


def remove_parts(directory: Path, release: Release) -> None:
    """Delete the parameters of the release's parts from a checkpoint."""
    for part in release.params:
        files.remove_directory(directory / "params" / part)
    if release.speech_tokenizer:
        (directory / speech_tokenizer.FILE).unlink(missing_ok=True)


def remove_files(paths: Sequence[Path]) -> None:
    """Delete files, those of them that exist, and the folders that are empty then."""
    for path in paths:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_into(
    directory: Path, release: Release, prompts: Mapping[str, Path], written: Written
) -> None:
    """Write everything of the release into a directory, config.json last. Raises as `write`.

    No file that is there already is replaced before all prompts have become voices.
    """
    for part, params in release.params.items():
        parameters.save_part(directory, part, params, written)
    x_vectors = release.voices | {
        name: voices.from_file(directory, release.config, path) for name, path in prompts.items()
    }
    for name, content in release.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(directory / name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.read_bytes())
    for name, x_vector in x_vectors.items():
        voices.save(directory, name, x_vector)
    if release.speech_tokenizer:
        speech_tokenizer.save_config(directory, release.speech_tokenizer)
    release.config.save(directory / "config.json")

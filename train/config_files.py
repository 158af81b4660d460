"""Config files: Python files that define `config`, given by path or, for those of configs/, by name
("stage1a").
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from omni2_jax import python_files
from omni2_jax.train.overrides import changed, nearest, renamed, validated
from omni2_jax.train.settings import Bucket, MeshConfig, OptimizerConfig, TrainConfig


def read(source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a file, with `key=value` changes.

    source: a path, or the name of a shipped config. Raises ValueError naming the file or the key,
    and what may have been meant; ModuleNotFoundError if the extra `train` is not installed.
    """
    path = python_files.find(source, TrainConfig.__name__)
    try:
        config = python_files.run(path).get("config")
    except ValueError as error:
        cause = error.__cause__
        raise ValueError(f"{error}{hint(cause) if isinstance(cause, Exception) else ''}") from None
    if not isinstance(config, TrainConfig):
        expected = "omni2_jax.train.settings.TrainConfig"
        raise ValueError(f"config {path} defines no `config` of type {expected}")
    return changed(validated(dataclasses.asdict(config), f"config {path}"), changes)


def hint(error: Exception) -> str:
    """What may have been meant, if a config file uses an unknown or a renamed setting or class."""
    kinds = {kind.__name__: kind for kind in (Bucket, OptimizerConfig, MeshConfig, TrainConfig)}
    keyword = re.search(
        r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if keyword and keyword[1] in kinds:
        known = [field.name for field in dataclasses.fields(kinds[keyword[1]])]
        return renamed(keyword[2]) or nearest(keyword[2], known)
    name = re.search(r"(?:cannot import name|^name) '(\w+)'", str(error))
    return renamed(name[1]) if name else ""

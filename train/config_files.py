"""Config files: Python files that define `config`, given by path or, for those of configs/, by name
("stage1a").
"""

import dataclasses
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

from omni2_jax.cli.console import missing_extra
from omni2_jax.train.overrides import changed, nearest, renamed, validated
from omni2_jax.train.settings import Bucket, MeshConfig, OptimizerConfig, TrainConfig

SHIPPED = Path(__file__).parents[1] / "configs"


def read(source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a file, with `key=value` changes.

    source: a path, or the name of a shipped config. Raises ValueError naming the file or the key,
    and what may have been meant; ModuleNotFoundError if the extra `train` is not installed.
    """
    path = config_file(source)
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # a config file is a program and may raise anything
        if isinstance(error, ModuleNotFoundError) and missing_extra(error):
            raise  # the extra `train` is not installed, which is no fault of the file
        message = f"{type(error).__name__}: {error}{hint(error)}"
        raise ValueError(f"config {path}: {message}") from None
    if not isinstance(config, TrainConfig):
        expected = "omni2_jax.train.settings.TrainConfig"
        raise ValueError(f"config {path} defines no `config` of type {expected}")
    return changed(validated(dataclasses.asdict(config), f"config {path}"), changes)


def config_file(source: str | Path) -> Path:
    """The file of a config, given by path or by name. Raises ValueError if there is none."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = {
        file.stem: file for file in SHIPPED.glob("*.py") if not file.stem.startswith(("_", "omni2"))
    }
    if str(source) in shipped:
        return shipped[str(source)]
    beside = map(str, path.parent.glob("*.py")) if path.parent.is_dir() else ()
    suggestion = nearest(str(source), sorted([*beside, *shipped]))
    names = ", ".join(sorted(shipped))
    raise ValueError(f"config {source} does not exist{suggestion}; shipped: {names}")


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

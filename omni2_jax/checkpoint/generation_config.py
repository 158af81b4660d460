"""generation_config.json of a checkpoint: how answers are sampled where options leave it open."""

import json
from pathlib import Path
from typing import Any

from omni2_jax.generate.options import SAMPLING, Options

FILE = "generation_config.json"


def load(directory: Path) -> dict:
    """The settings of a checkpoint's generation_config.json; none if there is no such file.

    Raises ValueError naming the file if it is no JSON object or a setting is out of range.
    """
    path = directory / FILE
    try:
        defaults = json.loads(path.read_text()) if path.exists() else {}
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(defaults, dict):
        raise ValueError(f"{path} holds no settings")
    stated: dict[str, Any] = {name: defaults.get(name) for name in SAMPLING}
    try:
        Options(**stated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return defaults

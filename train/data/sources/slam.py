"""SLAM-Omni's .jsonl: {"key", "source_wav", "source_text", "target_token", "target_text"}.

A line is one question and its reply; `target_wav` is the reply's recording. `rounds` says how lines
become dialogues and which tokens are refused.
"""

from collections.abc import Iterator
from pathlib import Path

from omni2_jax.train.data.sources import rounds
from omni2_jax.train.data.sources.base import Format
from omni2_jax.train.data.sources.json_files import json_lines


def items(file: Path) -> Iterator[tuple[object, float]]:
    return rounds.grouped(json_lines(file))


FORMAT = Format(items, rounds.parse)

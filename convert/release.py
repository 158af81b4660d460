"""What one source, or several, bring to a checkpoint. Several are merged before writing."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import PARTS, AdapterConfig, Omni2Config, SpeechTokenizerConfig
from omni2_jax.convert import start
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.plan import ConversionError, Table, plan
from omni2_jax.models.model import abstract_model


@dataclass
class Release:
    """The share of one source in a checkpoint.

    params: lazy parameters by part. files: name in the checkpoint -> a file to copy, or its
    content. voices: x-vectors by name. speech_tokenizer: its dimensions, which are no part of
    `config` because it is no part of the model.
    """

    config: Omni2Config
    params: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path | bytes] = field(default_factory=dict)
    voices: dict[str, np.ndarray] = field(default_factory=dict)
    speech_tokenizer: SpeechTokenizerConfig | None = None

    @property
    def nbytes(self) -> int:
        """The size of all parameters."""
        leaves = (parameters.flatten(params).values() for params in self.params.values())
        return sum(leaf.nbytes for part in leaves for leaf in part)


def combine(releases: Sequence[Release]) -> Release:
    """Several releases as one, with the new parts that training starts from (`with_new_parts`).

    Raises the errors of `merged`.
    """
    return with_new_parts(merged(releases))


def merged(releases: Sequence[Release]) -> Release:
    """Several releases as one.

    Raises ConversionError if two of them bring the same part, ValueError if they do not fit.
    """
    whole = Release(EMPTY_CONFIG)
    # The release with the speech LM also knows the tokens and R/W; else the one with an LLM does.
    for release in sorted(releases, key=lack_of_language):
        if twice := set(whole.params) & set(release.params):
            raise ConversionError(
                f"{', '.join(sorted(twice))} would come from two sources; name only one of them"
            )
        base = whole.config if whole.params else release.config
        parts = {
            name: getattr(release.config, name) or getattr(whole.config, name)
            for name in PARTS
            if name != "fusion"
        }
        whole = Release(
            base.replace(**parts),
            whole.params | release.params,
            whole.files | release.files,
            whole.voices | release.voices,
            whole.speech_tokenizer or release.speech_tokenizer,
        )
    whole.config.check()
    return whole


def lack_of_language(release: Release) -> tuple[bool, bool]:
    """A key to sort by: releases with a speech LM first, then those with an LLM."""
    return release.config.speech_lm is None, release.config.llm is None


def with_new_parts(release: Release) -> Release:
    """The release with a new adapter and a new gate fusion, where it has their neighbours only.

    Stage 1a trains the adapter, stage 2 the fusion.
    """
    config, params = release.config, dict(release.params)
    if config.speech_encoder and config.llm and not config.adapter:
        config = config.replace(adapter=AdapterConfig())
        params["adapter"] = start.adapter(config)
    if config.llm and config.speech_lm and config.mix != "text" and "fusion" not in params:
        params["fusion"] = start.fusion(config)
    return dataclasses.replace(release, config=config, params=params)


def plan_parts(
    table: Table, sources: Mapping[str, LazyArray], config: Omni2Config, path: Path
) -> dict[str, Any]:
    """The parameters of every part in `config`; the table's targets start with the part's name.

    Raises ConversionError, which starts with `path`, if the sources do not fit.
    """
    return plan(table, sources, abstract_model(config)[1], str(path))

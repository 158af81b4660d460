"""The training stages. To add one: a file with a subclass of `Stage` (see base.py), and its line in
`STAGES`.
"""

import dataclasses
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni2_jax.train.settings import TrainConfig
    from omni2_jax.train.stages.base import Stage

# Name in the settings -> class. As text, so that reading settings imports the one stage that they
# name.
STAGES = {
    "text": "omni2_jax.train.stages.text:Text",
    "1a": "omni2_jax.train.stages.speech_to_text:SpeechToText",
    "1b": "omni2_jax.train.stages.text_to_speech:TextToSpeech",
    "2": "omni2_jax.train.stages.speech_to_speech:SpeechToSpeech",
    "units": "omni2_jax.train.stages.units:Units",
    "flow": "omni2_jax.train.stages.flow:FlowMatching",
    "vocoder": "omni2_jax.train.stages.vocoder:VocoderStage",
}


def stage_class(name: str) -> "type[Stage]":
    """The class of a stage. Raises KeyError if `name` is not in the registry."""
    return pkgutil.resolve_name(STAGES[name])


def stage_of(train: "TrainConfig") -> "Stage":
    """The stage that a run's settings name, bound to these settings."""
    return stage_class(train.stage)(train)


def faults(train: "TrainConfig") -> list[str]:
    """What is wrong with the stage's name and with settings that belong to single stages."""
    if train.stage not in STAGES:
        *names, last = STAGES
        return [f"stage is {train.stage!r}, expected {', '.join(names)} or {last}"]
    stage = stage_class(train.stage)
    users: dict[str, list[str]] = {}  # stages by setting
    for name in STAGES:
        for setting in stage_class(name).settings:
            users.setdefault(setting, []).append(name)
    defaults = {
        item.name: item.default
        if item.default_factory is dataclasses.MISSING
        else item.default_factory()
        for item in dataclasses.fields(train)
    }
    unused = [
        f"{setting} is for stage {' and '.join(names)}; stage {train.stage} does not use it"
        for setting, names in users.items()
        if setting not in stage.settings and getattr(train, setting) != defaults[setting]
    ]
    return unused + stage.faults(train)

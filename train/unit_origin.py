"""Whose units a run reads.

The units of two speech tokenizers are numbers of the same range. A run that mixes them does
not fail, but it learns wrong words or sounds for its units.
"""

from collections.abc import Mapping
from pathlib import Path

from omni2_jax.checkpoint import parameters
from omni2_jax.models import speech_tokenizer
from omni2_jax.train.data.dataset import Dataset


def disagreement(checkpoint: Path, data: Mapping[str, Dataset]) -> str:
    """One line if the units of a run may be of several speech tokenizers, otherwise "".

    checkpoint: the one that the run starts from. data: its data sets by their setting. Units that
    `omni2 prepare` did not make are of an unknown tokenizer and not compared. A tokenizer whose
    parameters were only rounded counts as another one, so that this is a note, and no error.
    """
    made_by = {
        f"{name} ({opened.info.tokenizer})": opened.info.fingerprint
        for name, opened in data.items()
        if opened.info.fingerprint is not None
    }
    if made_by and "speech_tokenizer" in parameters.parts(checkpoint):
        own = speech_tokenizer.fingerprint(speech_tokenizer.load(checkpoint))
        made_by[f"checkpoint ({checkpoint})"] = own
    if len(set(made_by.values())) < 2:
        return ""
    listed = ", ".join(f"{name}: {fingerprint}" for name, fingerprint in made_by.items())
    return (
        f"the units may be of several speech tokenizers: {listed}; unless these are one tokenizer "
        "with rounded parameters, make the units again with omni2 prepare --speech-tokenizer"
    )

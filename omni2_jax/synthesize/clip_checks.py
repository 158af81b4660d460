"""Checks of synthesized clips: is there speech, as long as its text needs, and not clipped?"""

import re
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from omni2_jax.jobs import Refused

FRAME_SECONDS = 0.02
ACTIVE = 10 ** (-40 / 20)  # of the loudest frame: where speech is
SILENT = 10 ** (-55 / 20)  # the level of the loudest frame of a clip without speech
FULL_SCALE = 32700 / 32768
# Characters that a digit stands for, as it is spoken: "7" is "seven"; and a letter that is a word
# of its own, as in a spelling.
DIGIT_CHARACTERS = 5
LONE_LETTER_CHARACTERS = 4
LONE_LETTER = re.compile(r"(?<![\w'])[^\W\d_](?![\w'])")
SPARE_SECONDS = 0.6  # that a clip may be longer: a single letter takes as long as a short word


class Checks(BaseModel):
    """What clips must be like.

    seconds_per_character: the least and the most seconds of speech for each letter of the text.
    clipped: the largest share of samples at full scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds_per_character: tuple[float, float] = (0.025, 0.2)
    clipped: Annotated[float, Field(ge=0, le=1)] = 0.005

    def check(self, samples: np.ndarray, rate: int, text: str) -> None:
        """Raise Refused if samples [N] at `rate` Hz cannot be the text as speech."""
        seconds = speech_seconds(samples, rate)
        if not seconds:
            raise Refused("silent", f"nothing is to be heard of {text!r}")
        share = float(np.mean(np.abs(samples) >= FULL_SCALE))
        if share > self.clipped:
            raise Refused("clipped", f"{share:.1%} of the samples of {text!r} are at full scale")
        count = spoken_characters(text)
        least, most = (count * bound for bound in self.seconds_per_character)
        if seconds < least:
            raise Refused("too short", f"{seconds:.2f} s for {text!r}, expected {least:.2f} s")
        if seconds > most + SPARE_SECONDS:
            raise Refused(
                "too long", f"{seconds:.2f} s for {text!r}, expected {most + SPARE_SECONDS:.2f} s"
            )


def speech_seconds(samples: np.ndarray, rate: int) -> float:
    """The seconds from the first to the last frame of samples [N] that is not silent."""
    size = round(FRAME_SECONDS * rate)
    whole = samples[: len(samples) // size * size].reshape(-1, size)
    levels = np.sqrt(np.mean(np.square(whole, dtype=np.float64), axis=1))
    loudest = float(np.max(levels, initial=0))
    if loudest < SILENT:
        return 0.0
    active = np.flatnonzero(levels >= ACTIVE * loudest)
    return float(active[-1] - active[0] + 1) * FRAME_SECONDS


def spoken_characters(text: str) -> int:
    """The letters of a text as it is spoken, about."""
    digits = len(re.findall(r"\d", text))
    letters = sum(character.isalpha() for character in text)
    lone = len(LONE_LETTER.findall(text))
    return letters + DIGIT_CHARACTERS * digits + (LONE_LETTER_CHARACTERS - 1) * lone

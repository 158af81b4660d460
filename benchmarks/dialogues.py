"""Dialogues to measure training with: noise for recordings, random units, and a token for every word of their texts."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.config import UNITS_PER_SECOND, Omni2Config
from omni2_jax.models.model import SPEECH
from omni2_jax.train.data.records import RATES, Dialogue, Turn, encode_clip
from omni2_jax.train.data.writer import Writer
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_class

QUESTION_SECONDS = (2.0, 12.0)
UNITS_A_TOKEN = 6.5  # three words a second, 1.3 tokens a word
MARKUP = 30  # tokens of the chat template around a spoken turn, its first system line with it


class Words:
    """Stands in for a checkpoint's tokenizer, whose share of the loader's work is small beside the recordings'."""

    def __init__(self, config: Omni2Config):
        self.text = self
        self.positions = config.speech_positions

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def prompt(self, turns: Sequence[int]) -> list[int]:
        return [1] * MARKUP + [SPEECH] * (turns[0] * self.positions)

    def continuation(self, clips: int, ended: bool) -> list[int]:
        return self.prompt([clips])


def longest_reply(train: TrainConfig, config: Omni2Config) -> int:
    """Text tokens of the longest reply that fits into the stage's first bucket, its units with it."""
    bucket = train.buckets[0]
    if stage_class(train.stage).needs_recordings:
        return int(bucket.tokens / UNITS_A_TOKEN)
    spoken = (bucket.tokens - 3) / (1 + UNITS_A_TOKEN) if bucket.tokens else math.inf
    written = (
        bucket.positions / bucket.clips - MARKUP - Words(config).positions - 1
        if bucket.clips
        else math.inf
    )
    return int(min(spoken, written))


def write(path: Path, train: TrainConfig, config: Omni2Config, count: int) -> None:
    """A data set of `count` dialogues that fill the stage's first bucket by half to the whole, with as many turns as it has clips."""
    random, longest, bucket = (
        np.random.default_rng(0),
        longest_reply(train, config),
        train.buckets[0],
    )
    language = min(config.tokens.unit_eos, *config.tokens.text_eos)

    def noise(rate: int, seconds: float) -> np.ndarray:
        return 0.1 * random.standard_normal(int(rate * seconds))

    with Writer(path) as writer:
        for number in range(count):
            turns, clips = [], []
            for _ in range(max(bucket.clips, 1)):
                text = random.integers(0, language, int(longest * random.uniform(0.5, 1)))
                units = random.integers(0, config.units, int(len(text) * UNITS_A_TOKEN))
                question = (
                    noise(recordings.INPUT_RATE, random.uniform(*QUESTION_SECONDS))
                    if bucket.clips
                    else None
                )
                reply = (
                    noise(recordings.OUTPUT_RATE, len(units) / UNITS_PER_SECOND)
                    if stage_class(train.stage).needs_recordings
                    else None
                )
                for role, said, sound in (("user", None, question), ("assistant", units, reply)):
                    turns.append(
                        Turn(
                            role,
                            " ".join(map(str, text)),
                            said,
                            samples=0 if sound is None else len(sound),
                        )
                    )
                    clips.append(None if sound is None else encode_clip(sound, RATES[role]))
            writer.add(Dialogue(str(number), tuple(turns)), clips)

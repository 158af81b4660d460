"""Random dialogues to measure training with: noise for recordings, random units, and one token for
every word.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.config import UNITS_PER_SECOND, Omni2Config
from omni2_jax.models.model import SPEECH
from omni2_jax.train.data.records import RATES, Dialogue, Turn, encode_clip
from omni2_jax.train.data.writer import Writer
from omni2_jax.train.dialogues import speech_positions
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_class

QUESTION_SECONDS = (2.0, 12.0)
UNITS_PER_TOKEN = 6.5  # three words a second, 1.3 tokens a word
MARKUP = 30  # tokens of the chat template around a spoken turn, with the system line of the first


class WordTokenizer:
    """Stands in for a checkpoint's tokenizer, which takes little time beside the recordings."""

    def __init__(self, config: Omni2Config):
        self.text = self
        self.positions = speech_positions(config)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def prompt(self, turns: Sequence[int]) -> list[int]:
        return [1] * MARKUP + [SPEECH] * (turns[0] * self.positions)

    def continuation(self, turn: int, ended: bool) -> list[int]:
        return self.prompt([turn])


def longest_reply(train: TrainConfig, config: Omni2Config) -> int:
    """Text tokens of the longest reply that fits into the stage's first bucket together with its
    units.
    """
    bucket = train.buckets[0]
    if stage_class(train.stage).needs_recordings:
        return int(bucket.tokens / UNITS_PER_TOKEN)
    spoken = written = math.inf
    if bucket.tokens:
        spoken = (bucket.tokens - 3) / (1 + UNITS_PER_TOKEN)
    if bucket.segments:
        written = bucket.positions / bucket.segments - MARKUP - speech_positions(config) - 1
    return int(min(spoken, written))


def write(path: Path, train: TrainConfig, config: Omni2Config, count: int) -> None:
    """Write a data set of `count` dialogues with as many questions as the stage's first bucket has
    segments.

    They fill the bucket by half to the whole.
    """
    random, longest, bucket = (
        np.random.default_rng(0),
        longest_reply(train, config),
        train.buckets[0],
    )
    # Ids below all special tokens.
    vocabulary = min(config.tokens.unit_eos, *config.tokens.text_eos)
    has_recordings = stage_class(train.stage).needs_recordings

    def noise(rate: int, seconds: float) -> np.ndarray:
        return 0.1 * random.standard_normal(int(rate * seconds))

    with Writer(path) as writer:
        for number in range(count):
            turns, clips = [], []
            for _ in range(max(bucket.segments, 1)):
                ids = random.integers(0, vocabulary, int(longest * random.uniform(0.5, 1)))
                units = random.integers(0, config.units, int(len(ids) * UNITS_PER_TOKEN))
                question = reply = None
                if bucket.segments:
                    question = noise(recordings.INPUT_RATE, random.uniform(*QUESTION_SECONDS))
                if has_recordings:
                    reply = noise(recordings.OUTPUT_RATE, len(units) / UNITS_PER_SECOND)
                text = " ".join(map(str, ids))
                for role, turn_units, sound in (
                    ("user", None, question),
                    ("assistant", units, reply),
                ):
                    samples = 0 if sound is None else len(sound)
                    turns.append(Turn(role, text, turn_units, samples=samples))
                    clips.append(None if sound is None else encode_clip(sound, RATES[role]))
            writer.add(Dialogue(str(number), tuple(turns)), clips)

"""A design of a tiny model for `omni2 new`, as the text of a config file, and a text for it."""

import random
from pathlib import Path

DESIGN = """
from omni2_jax.config import (
    AdapterConfig, DecoderConfig, FlowConfig, HiftConfig, Omni2Config, SpeakerConfig,
    SpeechEncoderConfig, SpeechTokenizerConfig,
)

config = Omni2Config(
    llm=DecoderConfig(vocabulary=320, width=32, layers=2, heads=2, kv_heads=1, hidden=64),
    speech_encoder=SpeechEncoderConfig(mels=80, frames=100, width=16, layers=1, heads=2),
    adapter=AdapterConfig(hidden=32),
    speech_lm=DecoderConfig(width=24, layers=1, heads=2, kv_heads=1, hidden=48),
    flow=FlowConfig(
        units=81, width=16, heads=2, hidden=16, layers=1, up_layers=1, channels=16,
        estimator_heads=2, estimator_head_size=8, blocks=1, mid_blocks=1, noise_frames=500,
    ),
    vocoder=HiftConfig(
        channels=16, f0_channels=16, resblock_kernels=(3,), resblock_dilations=((1,),),
        source_kernels=(3, 3, 3), source_dilations=((1,),) * 3,
    ),
    speaker=SpeakerConfig(
        head_channels=4, channels=16, growth=4, bottleneck=1, layers=(1, 1, 1)
    ),
    units=81,
)
speech_tokenizer = SpeechTokenizerConfig(mels=80, width=16, layers=1, heads=2, digits=4)
"""
TEXT = """
    what is the sum of one two three four five six seven eight nine ten and how many days are in
    a week name the capital of France Spain Italy it has colours red green blue please say that
"""


def write(folder: Path) -> tuple[Path, Path]:
    """Write both into a folder; their paths."""
    design, words = folder / "design.py", folder / "text.txt"
    design.write_text(DESIGN)
    words.write_text(text())
    return design, words


def text(lines: int = 200, seed: int = 0) -> str:
    """So many lines of words in any order."""
    draw, words = random.Random(seed), TEXT.split()
    return "".join(f"{' '.join(draw.choices(words, k=8))}.\n" for _ in range(lines))

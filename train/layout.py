"""A reply in the order in which the speech LM hears and says it: R text tokens, W units, R text tokens ... <sep>, the rest, eos.

It is what `omni2_jax.readwrite` does when it generates, so that training and inference agree in every row: the last group of text,
full or not, is followed by <sep>; where the units run out before the text, every later burst is an eos, which stays in the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni2_jax.config import Omni2Config
from omni2_jax.train.losses import IGNORE


@dataclass(frozen=True)
class Layout:
    """S rows. A row's target is what the speech LM should say after it, IGNORE where it only listens (paper equation 5)."""

    tokens: np.ndarray  # [S] in the vocabulary of the speech LM
    targets: np.ndarray  # [S]
    source: np.ndarray  # [S] which text token a row is, -1 for units, <sep> and eos


def arrange(
    text: Sequence[int], units: Sequence[int], config: Omni2Config, offline: bool = False
) -> Layout:
    """Text token ids, the end token with them, and units (0..6560) of one reply.

    offline: all of the text comes first (the paper's offline TTS).
    """
    ids, size = config.tokens, len(text) if offline else config.read
    spoken = [ids.sep + 1 + unit for unit in units]
    tokens, targets, source = [], [], []
    for start in range(0, len(text), size):
        group, last = text[start : start + size], start + size >= len(text)
        tokens += [*group, *([ids.sep] if last else [])]
        source += [*range(start, start + len(group)), *([-1] if last else [])]
        burst = spoken if last else spoken[: config.write]
        spoken = spoken[len(burst) :]
        if last or len(burst) < config.write:
            burst = [*burst, ids.unit_eos]
        # The row before a unit has it as its target; what is said last in a burst is heard with the next text.
        targets += [IGNORE] * (len(tokens) - len(targets) - 1) + burst + ([] if last else [IGNORE])
        heard = burst[:-1] if last else burst
        tokens += heard
        source += [-1] * len(heard)
    return Layout(
        np.array(tokens, np.int32), np.array(targets, np.int32), np.array(source, np.int32)
    )

"""The order of text and units for the speech LM: R text tokens, W units, R text tokens, ... <sep>,
the other units, eos.

It is the order in which generate/read_write.py generates, so that training and inference agree at
every position:

- <sep> follows the last group of text tokens, whether the group is full or not.
- If the units end before the text does, eos is the next target and stays in the context; every
later write is one eos.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni2_jax.config import Omni2Config
from omni2_jax.train.losses import IGNORE


@dataclass(frozen=True)
class Layout:
    """The S positions of one reply.

    The target of a position is the token that the speech LM should predict there, IGNORE where it
    only reads (paper equation 5).
    """

    tokens: np.ndarray  # [S] in the vocabulary of the speech LM
    targets: np.ndarray  # [S]
    source: np.ndarray  # [S] index of the text token at a position, -1 for units, <sep> and eos


def arrange(
    text: Sequence[int], units: Sequence[int], config: Omni2Config, offline: bool = False
) -> Layout:
    """The layout of a reply.

    text: token ids, with the end token. units: 0..6560. offline: all of the text precedes the first
    unit (offline text to speech in the paper's tables 3 and 4).
    """
    ids = config.tokens
    group_size = len(text) if offline else config.read
    remaining = [ids.sep + 1 + unit for unit in units]
    tokens, targets, source = [], [], []
    for start in range(0, len(text), group_size):
        end = start + group_size
        group, is_last = text[start:end], end >= len(text)
        tokens += group
        source += range(start, start + len(group))
        if is_last:
            tokens.append(ids.sep)
            source.append(-1)
        written = remaining if is_last else remaining[: config.write]
        remaining = remaining[len(written) :]
        if is_last or len(written) < config.write:
            written = [*written, ids.unit_eos]
        # The first token of a write is predicted at the position before it.
        targets += [IGNORE] * (len(tokens) - len(targets) - 1)
        targets += written
        # What a write ends with is in the context of the next group; after the last write there is
        # none.
        context = written[:-1] if is_last else written
        if not is_last:
            targets.append(IGNORE)
        tokens += context
        source += [-1] * len(context)
    return Layout(
        np.array(tokens, np.int32), np.array(targets, np.int32), np.array(source, np.int32)
    )

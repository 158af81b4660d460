"""What users say, as text that grows while they say it. The model itself does not need it.

A recogniser takes whole recordings. So it hears a turn again whenever that has become a second
longer. Words are certain once two hearings in a row agree on them and on all words before: the last
ones of a recording that is cut off are often wrong.
"""

import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE

NEW_SECONDS = 1.0  # of speech, before the recogniser hears a turn again


class GrowingTranscript:
    """The words of one turn that are certain so far."""

    def __init__(self, item_id: str):
        """item_id: of the item that the turn will become."""
        self.item_id = item_id
        self.heard = 0  # samples
        self.last: list[str] = []
        self.certain: list[str] = []

    def needs(self, samples: np.ndarray) -> bool:
        """Whether there is enough that was not heard yet in samples [N] of the turn, at 16 kHz."""
        if len(samples) - self.heard < NEW_SECONDS * INPUT_RATE:
            return False
        self.heard = len(samples)
        return True

    def add(self, text: str) -> str:
        """What can be written behind the words so far, after one more hearing; "" for nothing."""
        words, known = text.split(), len(self.certain)
        agreed = 0
        while agreed < min(len(words), len(self.last)) and words[agreed] == self.last[agreed]:
            agreed += 1
        self.last = words
        if words[:known] != self.certain or agreed <= known:
            return ""
        self.certain = words[:agreed]
        return " " * bool(known) + " ".join(words[known:agreed])

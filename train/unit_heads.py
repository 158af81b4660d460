"""What reads units while the speech tokenizer is trained: characters by CTC, and mel frames.

The heads are private to the run: an exported checkpoint does not have them. B batch, T units, K
digits, D width, L labels, M mel bins.
"""

import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import FRAMES_PER_UNIT, SpeechTokenizerConfig
from omni2_jax.models.layers import Linear, inside
from omni2_jax.models.speech_encoder import gelu
from omni2_jax.models.speech_tokenizer import Block
from omni2_jax.models.stacks import scan, stack

Array = jax.Array

SYMBOLS = 256  # the bytes of UTF-8: any language, without a list of characters
BLANK = 0  # no text has this byte
LAYERS = 2
MELS = 80  # of the flow and the vocoder
# Of the log-mel of speech at 24 kHz, about: the mel head begins at this mean, in this unit.
MEL_MEAN, MEL_DEVIATION = -5.0, 2.5


class UnitHeads(nnx.Module):
    """Digits of units -> two blocks -> 50 frames a second: logits of characters, and log-mel.

    The blocks see all units of a recording, as the rest of the encoder and the recogniser do when
    CosyVoice 2 trains its tokenizer (arXiv 2412.10117, section 2.2).
    """

    def __init__(self, config: SpeechTokenizerConfig, rngs: nnx.Rngs):
        d = config.width
        self.embed = Linear(rngs, (config.digits, d), (None, "embed"))
        self.blocks = stack(LAYERS, lambda r: Block(config, r), rngs)
        self.split = Linear(rngs, (d, FRAMES_PER_UNIT, d), ("embed", None, "embed"))
        self.characters = Linear(rngs, (d, SYMBOLS), ("embed", None))
        self.mel = Linear(rngs, (d, MELS), ("embed", None))

    def __call__(self, digits: Array, lengths: Array) -> tuple[Array, Array]:
        """Digits [B, T, K] and lengths [B] -> logits [B, 2T, 256] and log-mel [B, 2T, M]."""
        rows, size, _ = digits.shape
        valid = inside(lengths, size)[..., None]
        x = scan(self.blocks, lambda block, x, _: (block(x, valid), None), self.embed(digits))[0]
        frames = gelu(self.split(x)).reshape(rows, FRAMES_PER_UNIT * size, -1)
        return self.characters(frames), MEL_MEAN + MEL_DEVIATION * self.mel(frames)


def labels_of(text: str) -> np.ndarray:
    """The letters and digits of a text that can be heard, as bytes int32 [L]: "It's 5." -> its 5

    Letters are in lower case; other characters separate words and are dropped otherwise.
    """
    words = unicodedata.normalize("NFKC", text).casefold()
    words = words.replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in words)
    return np.frombuffer(" ".join(kept.split()).encode(), np.uint8).astype(np.int32)


def greedy(logits: Array, lengths: Array) -> tuple[Array, Array]:
    """The likeliest symbols int32 [B, T] of logits [B, T, S], and which of them count, bool.

    Blanks, repetitions and what lies beyond `lengths` [B] do not count (CTC's rule).
    """
    symbols = jnp.argmax(logits, -1)
    before = jnp.pad(symbols, ((0, 0), (1, 0)))[:, :-1]  # BLANK comes before the first
    counts = (symbols != BLANK) & (symbols != before) & inside(lengths, symbols.shape[1])
    return symbols, counts


def edit_distance(symbols: Array, counts: Array, labels: Array, lengths: Array) -> Array:
    """Levenshtein's distance int32 [B] of two sequences for each row.

    symbols [B, T], of which those that `counts` [B, T]; labels [B, L], of which the first `lengths`
    [B].
    """
    index = jnp.arange(labels.shape[1] + 1)

    def read(row: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        symbol, is_counted = xs
        replaced = row[:, :-1] + (symbol[:, None] != labels)
        best = jnp.concatenate([row[:, :1] + 1, jnp.minimum(replaced, row[:, 1:] + 1)], 1)
        # A missing label costs 1 more than the entry to the left: a running minimum.
        best = index + jax.lax.cummin(best - index, axis=1)
        return jnp.where(is_counted[:, None], best, row), None

    first = jnp.broadcast_to(index, (labels.shape[0], len(index)))
    last, _ = jax.lax.scan(read, first, (symbols.T, counts.T))
    return jnp.take_along_axis(last, lengths[:, None], axis=1)[:, 0]

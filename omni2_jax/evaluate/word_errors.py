"""Texts as the field compares them, and the word error rate (WER) of a set of transcripts.

Normalisation is Whisper's for English (case, punctuation, spellings, numbers as digits), as in the
paper (section 4.2).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omni2_jax.evaluate.estimates import Estimate, ratio

NORMALISER = "Whisper's English normaliser (whisper-normalizer)"


@dataclass(frozen=True)
class WordErrors:
    """Differences between a reference text and a transcript of it, after normalisation."""

    errors: int  # substitutions, deletions and insertions
    words: int  # of the reference

    @property
    def rate(self) -> float:
        """Errors per word; of an empty reference, their number."""
        return self.errors / max(1, self.words)


@functools.cache
def normaliser() -> Callable[[str], str]:
    """The function from a text to its normalised form."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalised(text: str) -> str:
    """A text without what no listener can hear: "It's 3 colours!" -> "it is 3 colors"."""
    return normaliser()(text)


def compare(reference: str, transcript: str) -> WordErrors:
    """The word errors of a transcript; both texts are normalised first."""
    import jiwer

    output = jiwer.process_words(normalised(reference), normalised(transcript))
    errors = output.substitutions + output.deletions + output.insertions
    return WordErrors(errors, output.hits + output.substitutions + output.deletions)


def corpus_rate(counts: Sequence[WordErrors]) -> Estimate:
    """All errors over all words, in percent, and not a mean of rates: long texts weigh more.

    The interval is that of a bootstrap over the texts. Raises ValueError for no words at all.
    """
    if not sum(item.words for item in counts):
        raise ValueError("no reference has a word, so there is no word error rate")
    errors, words = [item.errors for item in counts], [item.words for item in counts]
    return ratio(errors, words).scaled(100)

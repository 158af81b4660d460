"""Whether a text is fit to be spoken."""

import re
import unicodedata
from dataclasses import dataclass

PUNCTUATION = set(".,?!;:'\"-¿¡\u2018\u2019\u201c\u201d\u2013\u2014\u2026")  # quotes, dashes, dots
# What is looked for in a text, line by line -> what is wrong with it.
FAULTS = (
    (
        re.compile(r"```|`[^`]+`|</?\w+>|^\s*(def|class|import|function|#include)\b.*[:;({]\s*$"),
        "code",
    ),
    (re.compile(r"https?:|www\.|\b[\w-]+\.(com|org|net|edu|gov|io)\b|\S@\S+\.\w"), "a link"),
    (
        re.compile(
            r"^\s*([-*+\u2013\u2022\u2023\u25e6]|\(?\d{1,2}[.)]|\(?[a-zA-Z]\))\s+\S"
            r"|\b1[.)]\s.*\b2[.)]\s"
        ),
        "a list",
    ),
    (re.compile(r"^\s*#{1,6}\s|\*\*|__|^\s*\|.*\||\[[^\]]*\]\(|^\s*(---+|===+)\s*$"), "markup"),
)
LABEL = re.compile(r"^\s*(user|assistant|human|question|answer|ai)\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """What is asked of a text. max_words: its length. numbers_as_words: it has no digits."""

    max_words: int
    numbers_as_words: bool = False


def fault(text: str, limits: Limits) -> str | None:
    """Why a text cannot be spoken, in a few words; None if it can.

    A fault is the same for every text that has it, so that faults can be counted.
    """
    if not any(character.isalnum() for character in text):
        return "no words"
    if LABEL.match(text):
        return "a label before the text"
    for pattern, name in FAULTS:
        if any(pattern.search(line) for line in text.splitlines()):
            return name
    for character in text:
        if not is_spoken(character):
            return f"the symbol {character!r}" if character.isprintable() else "a control character"
    if limits.numbers_as_words and any(character.isdigit() for character in text):
        return "digits"
    return "too long" if len(text.split()) > limits.max_words else None


def is_spoken(character: str) -> bool:
    """True for letters and their marks, digits, white space and the punctuation of sentences."""
    return (
        character in PUNCTUATION
        or character.isspace()
        or unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd")
    )


def cleaned(text: str) -> str:
    """A text in one line, without quotation marks around the whole of it."""
    text = " ".join(text.split())
    for opening, closing in ('""', "\u201c\u201d", "''"):
        inner = text[1:-1]
        if len(text) > 2 and text[0] == opening and text[-1] == closing:
            return text if {opening, closing} & set(inner) else inner.strip()
    return text

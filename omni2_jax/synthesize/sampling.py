"""Distinct dialogues of a grammar: as many of each split as are wanted."""

import random
import sys
from collections.abc import Iterator, Mapping

from omni2_jax.synthesize.grammar import Draft, Grammar
from omni2_jax.synthesize.records import TextDialogue

MAX_FAILURES = 5_000  # drafts in a row that are of no use, before all dialogues are listed
MAX_LISTED = 300_000  # drafts that are looked at when all are listed


class Sampler:
    """Draws dialogues at random. When hardly any is new, it goes through all that exist.

    wanted: how many of each split. left: how many are still to be made. Raises ValueError if
    dialogues are wanted of a split of which the grammar has none.
    """

    def __init__(self, grammar: Grammar, wanted: Mapping[str, int], seed: int):
        self.grammar, self.wanted, self.seed = grammar, dict(wanted), seed
        self.left = dict(wanted)
        self.made: set[str] = set()
        for split, count in wanted.items():
            if count and (reason := grammar.lacks(split)):
                raise ValueError(f"the grammar has no dialogues of the split {split}: {reason}")

    def __iter__(self) -> Iterator[TextDialogue]:
        """The dialogues, in a random order that follows from the seed.

        Raises ValueError, after those that there are, if fewer exist than are wanted.
        """
        yield from self.drawn()
        if any(self.left.values()):
            yield from self.listed()

    def drawn(self) -> Iterator[TextDialogue]:
        rng, failures = random.Random(self.seed), 0
        while any(self.left.values()) and failures < MAX_FAILURES:
            dialogue = self.new(self.grammar.draw(rng))
            failures = failures + 1 if dialogue is None else 0
            if dialogue is not None:
                yield dialogue

    def listed(self) -> Iterator[TextDialogue]:
        """What `drawn` has left over, from all dialogues in their order."""
        looked_at = 0
        lengths = [length for length, weight in enumerate(self.grammar.turns, 1) if weight > 0]
        for length in lengths:
            for draft in self.grammar.all_drafts(length):
                if not any(self.left.values()):
                    return
                looked_at += 1
                if looked_at > MAX_LISTED:
                    raise ValueError(self.too_few("hardly more than "))
                dialogue = self.new(draft)
                if dialogue is not None:
                    yield dialogue
        if any(self.left.values()):
            raise ValueError(self.too_few(""))

    def new(self, draft: Draft | None) -> TextDialogue | None:
        """The dialogue of a draft, if it is wanted, asks nothing twice and was not made before."""
        if draft is None or not self.left.get(draft.split()):
            return None
        dialogue = draft.dialogue()
        repeats = len(set(dialogue.questions)) < len(dialogue.questions)
        text = dialogue.id.rpartition("-")[2]  # a hash of the questions
        if repeats or text in self.made:
            return None
        self.made.add(text)
        self.left[dialogue.split] -= 1
        return dialogue

    def too_few(self, qualifier: str) -> str:
        faults = [
            f"{qualifier}{self.wanted[split] - left} dialogues of the split {split}, "
            f"{self.wanted[split]} are wanted"
            for split, left in self.left.items()
            if left
        ]
        return "the grammar has " + "; ".join(faults)


def sentences(grammar: Grammar, kind: str, count: int, seed: int) -> Iterator[str]:
    """`count` distinct sentences of the split "seen".

    kind: "questions", "replies" or "both". Raises ValueError, after those that were found, if the
    grammar has fewer, or hardly any more.
    """
    found: dict[str, None] = {}
    failures = 0
    try:
        for dialogue in Sampler(grammar, {"seen": sys.maxsize}, seed):
            failures += 1
            for text in texts(dialogue, kind):
                if text and text not in found:
                    found[text], failures = None, 0
                    yield text
                if len(found) == count:
                    return
            if failures > MAX_FAILURES:  # new dialogues of sentences that are not new
                break
    except ValueError:
        pass  # there are no more dialogues
    raise ValueError(
        f"the grammar has {len(found)} distinct {kind} or few more; {count} are wanted"
    )


def texts(dialogue: TextDialogue, kind: str) -> list[str]:
    """The questions, the replies or both, in their order."""
    pairs = [(turn.question, turn.reply) for turn in dialogue.turns]
    chosen = {"questions": slice(0, 1), "replies": slice(1, 2)}.get(kind, slice(0, 2))
    return [text for pair in pairs for text in pair[chosen]]

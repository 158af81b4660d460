"""Dialogues as text as a data set: a .jsonl of `omni2 synthesize dialogues`, without recordings."""

import dataclasses
from pathlib import Path

from omni2_jax.synthesize.records import TextDialogue, read_dialogues
from omni2_jax.train.data.records import Dialogue, Turn

SEEN = "seen"  # the split that is trained on


@dataclasses.dataclass(frozen=True)
class Labels:
    """By which replies are counted apart: the topic and the split of each."""

    topic: str = ""
    split: str = ""


class Texts:
    """The dialogues of a .jsonl, in memory, with the methods of `Dataset` that text needs.

    split: "data" takes the dialogues of the split "seen"; "validation" the others, or all of a file
    that has no others. Raises ValueError naming the file if it cannot be read, or has none of them.
    """

    def __init__(self, path: str | Path, split: str):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path} does not exist")
        every = list(read_dialogues(self.path))
        seen = [dialogue for dialogue in every if dialogue.split == SEEN]
        unseen = [dialogue for dialogue in every if dialogue.split != SEEN]
        self.dialogues: list[TextDialogue] = seen if split == "data" else unseen or every
        if not self.dialogues:
            raise ValueError(f"{path} has no dialogue of the split {SEEN!r} to train on")

    def __len__(self) -> int:
        return len(self.dialogues)

    def dialogue(self, index: int) -> Dialogue:
        """The texts of a dialogue."""
        dialogue = self.dialogues[index]
        texts = [text for turn in dialogue.turns for text in (turn.question, turn.reply)]
        roles = ("user", "assistant")
        return Dialogue(
            dialogue.id, tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts))
        )

    def labels(self, index: int, reply: int) -> Labels:
        """Those of a dialogue's reply, counted from 0."""
        dialogue = self.dialogues[index]
        return Labels(dialogue.turns[reply].topic or dialogue.topic, dialogue.split)

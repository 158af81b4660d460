"""Dialogues as text: the file between `omni2 synthesize dialogues` and `omni2 synthesize speech`.

A .jsonl file with one dialogue a line:

    {"id": "add-5f1c02a9be", "split": "seen", "topic": "add", "turns": [
      {"question": "What is seven plus two?", "reply": "Seven plus two is nine.",
       "answers": ["is nine"], "topic": "add"},
      {"question": "And minus four?", "reply": "Nine minus four is five.",
       "answers": ["is five"], "topic": "minus"}]}

id       unique in the file; it may be the name of a file
split    for training: "seen". For evaluation: "unseen_phrasing", "unseen_values", "unseen_both"
question what the user says. An empty one stands for a recording without speech
answers  what a right reply contains, as whole words: one of these texts. None: nothing is known
topic    of a dialogue: that of its first turn
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omni2_jax import files
from omni2_jax.validation import validated

SPLITS = ("seen", "unseen_phrasing", "unseen_values", "unseen_both")


@dataclass(frozen=True)
class TextTurn:
    """One question and its reply, see the file's description above."""

    question: str
    reply: str
    answers: list[str] = dataclasses.field(default_factory=list)
    topic: str = ""


@dataclass(frozen=True)
class TextDialogue:
    """One line of the file."""

    id: str
    split: str
    topic: str
    turns: list[TextTurn]

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(turn.question for turn in self.turns)

    def __post_init__(self):
        if not self.id or self.id.startswith(".") or {"/", "\\", "\0"} & set(self.id):
            raise ValueError(f"id is {files.short(self.id)}, expected the name of a file")
        if self.split not in SPLITS:
            raise ValueError(f"split is {files.short(self.split)}, expected {', '.join(SPLITS)}")
        if not self.turns:
            raise ValueError("turns is empty, expected at least one turn")
        if not all(turn.reply.strip() for turn in self.turns):
            raise ValueError("a reply is empty, expected a text")

    def to_json(self) -> str:
        """The dialogue as a line of the file, without the line's end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def read_dialogues(path: Path) -> Iterator[TextDialogue]:
    """The dialogues of a .jsonl file, in its order.

    Raises ValueError naming file and line if a line is no dialogue, or an id comes twice.
    """
    seen: set[str] = set()
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                dialogue = validated(TextDialogue, line, f"{path}, line {number}")
                if dialogue.id in seen:
                    raise ValueError(f"{path}, line {number}: id {dialogue.id!r} comes twice")
                seen.add(dialogue.id)
                yield dialogue
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None

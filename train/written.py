"""Dialogues of typed questions as the LLM reads them. T LLM positions."""

from dataclasses import dataclass

import numpy as np

from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.records import Dialogue
from omni2_jax.train.data.texts import Texts
from omni2_jax.train.examples import Examples


@dataclass(frozen=True)
class Written:
    """A dialogue as token ids. Reply k with its end token starts at `starts[k]`."""

    ids: np.ndarray  # [T]
    replies: list[list[int]]
    starts: list[int]


def written(examples: Examples, dialogue: Dialogue) -> Written:
    """A dialogue as token ids, by the tokenizer of `examples`.

    Raises ValueError if there is no question, one whose words are not known, or a reply without
    tokens.
    """
    assert examples.tokenizer is not None
    if dialogue.is_recording:
        raise ValueError("it is a recording with its text, without a question")
    ids, replies, starts = [], [], []
    for question, reply in zip(dialogue.turns[::2], dialogue.turns[1::2], strict=True):
        if not question.is_written:
            raise ValueError(f"the words of a question are not known, its text is {question.text}")
        if replies:
            ids += examples.tokenizer.continuation(question.text, ended=True)
        else:
            ids += examples.tokenizer.prompt([question.text])
        starts.append(len(ids))
        replies.append(examples.encode(reply))
        ids += replies[-1]
    return Written(np.array(ids, np.int32), replies, starts)


def open_texts(path: str, split: str) -> Dataset | Texts:
    """A .jsonl of dialogues, or a data set of which only the texts are read. Raises ValueError."""
    return Texts(path, split) if path.endswith(".jsonl") else Dataset(path)

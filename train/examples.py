"""Training examples as rows of a batch: numpy arrays whose static shapes follow from a bucket.

C segments, T LLM positions, S tokens of the speech LM. What a row holds is stated by the stages;
here are the base class and what several stages share.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.records import Turn
from omni2_jax.train.layout import Layout, arrange
from omni2_jax.train.settings import Bucket, TrainConfig

PAD = -1  # the id of an empty position

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Item:
    """One example: a dialogue, or one reply of it, and its size."""

    dialogue: int  # index in the data set
    turn: int | None  # index of the reply in the dialogue; None for the whole dialogue
    size: Bucket


class Examples(abc.ABC):
    """The examples of a data set for one stage. tokenizer: None for a stage without text."""

    def __init__(
        self,
        train: TrainConfig,
        config: Omni2Config,
        tokenizer: Tokenizer | None,
        data: Dataset,
    ):
        self.train, self.config, self.tokenizer, self.data = train, config, tokenizer, data

    def __len__(self) -> int:
        """How many indices `items` takes."""
        return len(self.data)

    def name(self, index: int) -> str:
        """How messages name the examples of `items(index)`."""
        return f"dialogue {index}"

    @abc.abstractmethod
    def items(self, index: int) -> list[Item]:
        """The examples of dialogue `index`.

        Raises ValueError if it lacks what the stage needs, and RecordError, a ValueError, if its
        record is damaged.
        """

    @abc.abstractmethod
    def empty(self, bucket: Bucket) -> Row:
        """A row of padding; it has no loss."""

    @abc.abstractmethod
    def fill(self, row: Row, item: Item) -> None:
        """Write an example into an empty row. Raises RecordError for a damaged record."""

    def row(self, item: Item, bucket: Bucket) -> Row:
        """The arrays of an example, padded to a bucket. Raises RecordError for a damaged record."""
        row = self.empty(bucket)
        self.fill(row, item)
        return row

    def encode(self, reply: Turn) -> list[int]:
        """A reply's token ids, with the end token, which the speech LM reads too.

        Raises ValueError if the reply has no tokens.
        """
        assert self.tokenizer is not None, "a stage with text has a tokenizer"
        ids = self.tokenizer.answer(reply.text)
        if not ids:
            raise ValueError(f"the reply {reply.text!r} has no tokens")
        return [*ids, self.config.tokens.text_eos[0]]

    def arrange(self, reply: Turn, text: Sequence[int]) -> Layout:
        """The sequence of the speech LM for a reply with these token ids.

        Raises ValueError if the reply has no units, or some that the speech LM does not know.
        """
        if reply.units is None:
            raise ValueError(
                "a reply has no units; omni2 prepare --speech-tokenizer makes them from recordings"
            )
        check_known(reply.units, self.config.units)
        offline = self.train.layout == "offline"
        return arrange(text, reply.units.tolist(), self.config, offline)


class ReplyExamples(Examples):
    """Examples that are single replies (the assistant's turns)."""

    def items(self, index: int) -> list[Item]:
        replies = self.data.dialogue(index).replies
        return [
            Item(index, turn, Bucket(0, 0, self.reply_size(turn, reply)))
            for turn, reply in replies.items()
        ]

    @abc.abstractmethod
    def reply_size(self, turn: int, reply: Turn) -> int:
        """The tokens of a reply. Raises ValueError if it lacks what the stage needs."""

    def reply(self, item: Item) -> Turn:
        """The reply that an item refers to."""
        assert item.turn is not None
        return self.data.dialogue(item.dialogue).turns[item.turn]


def check_known(units: np.ndarray, count: int) -> None:
    """Raise ValueError unless units [U] of a reply are among the `count` units of a checkpoint."""
    if units.max() >= count:
        raise ValueError(
            "a reply has units that the checkpoint does not know; prepare the data with the speech "
            f"tokenizer of this checkpoint (unit {units.max()}, expected 0 to {count - 1})"
        )


def full(shape: int | tuple[int, ...], value: int) -> np.ndarray:
    """An int32 array of one value."""
    return np.full(shape, value, np.int32)


def put(row: Row, values: Mapping[str, np.ndarray], index: tuple[int, ...] = ()) -> None:
    """Write values at the start of the row's arrays, or of the subarrays at `index`."""
    for name, value in values.items():
        row[name][(*index, slice(None, len(value)))] = value

"""Stage "text": the LLM alone learns dialogues as text, before it hears any.

A little LLM from nothing needs it: it knows nothing yet. The loss is the cross-entropy of the
replies. Short dialogues share a row, and each sees itself alone. B batch, T LLM positions, D width.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.console import console
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.texts import Labels, Texts
from omni2_jax.train.examples import PAD, Examples, Item, Row, full
from omni2_jax.train.losses import IGNORE, token_hits, token_loss
from omni2_jax.train.packing import pack
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage
from omni2_jax.train.written import Written, open_texts, written


class WrittenExamples(Examples):
    """Rows of several dialogues each, packed for the largest bucket; `items` takes a row's number.

    All dialogues are kept in memory as token ids.
    """

    def __init__(
        self,
        train: TrainConfig,
        config: Omni2Config,
        tokenizer: Tokenizer | None,
        data: Dataset | Texts,
    ):
        # Texts have the methods of a data set that are used here.
        super().__init__(train, config, tokenizer, cast(Dataset, data))
        indices = rich.progress.track(
            range(len(data)),
            f"encoding {data.path}",
            console=console,
            transient=True,
            disable=jax.process_index() != 0,
        )
        self.written = [self.read(index) for index in indices]
        sizes = [0 if isinstance(w, ValueError) else len(w.ids) for w in self.written]
        capacity = max(bucket.positions for bucket in train.buckets)
        self.rows = pack([size or capacity + 1 for size in sizes], capacity)
        used = {index for row in self.rows for index in row}
        # A row for each of the others: `items` tells what is wrong with it.
        self.rows += [[index] for index in range(len(sizes)) if index not in used]
        self.topics, self.splits = self.names("topic"), self.names("split")

    def names(self, kind: str) -> list[str]:
        """The topics, or the splits, of all replies; none if the data set does not state them."""
        labels = [
            self.labels(index, reply)
            for index, one in enumerate(self.written)
            if isinstance(one, Written)
            for reply in range(len(one.replies))
        ]
        return sorted({getattr(label, kind) for label in labels} - {""})

    def labels(self, index: int, reply: int) -> Labels:
        return self.data.labels(index, reply) if isinstance(self.data, Texts) else Labels()

    def read(self, index: int) -> "Written | ValueError":
        """A dialogue as token ids, or what is wrong with it."""
        try:
            return written(self, self.data.dialogue(index))
        except ValueError as error:
            return error

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        numbers = self.rows[index]
        return f"dialogue{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"

    def items(self, index: int) -> list[Item]:
        size = 0
        for number in self.rows[index]:
            one = self.written[number]
            if isinstance(one, ValueError):
                raise one
            size += len(one.ids)
        return [Item(index, None, Bucket(0, size, 0))]

    def empty(self, bucket: Bucket) -> Row:
        size = bucket.positions
        return {
            "ids": full(size, PAD),
            "positions": full(size, PAD),  # in the dialogue
            "dialogue": full(size, PAD),  # which one of the row
            "targets": full(size, IGNORE),
            "reply": full(size, PAD),  # which one of the row a target belongs to
            "topic": full(size, PAD),  # of each reply of the row, an index into `topics`
            "split": full(size, PAD),
        }

    def fill(self, row: Row, item: Item) -> None:
        first, count = 0, 0  # position and reply
        for number, index in enumerate(self.rows[item.dialogue]):
            one = self.written[index]
            assert isinstance(one, Written)
            size = len(one.ids)
            place = slice(first, first + size)
            row["ids"][place], row["positions"][place] = one.ids, np.arange(size)
            row["dialogue"][place] = number
            for reply, (start, text) in enumerate(zip(one.starts, one.replies, strict=True)):
                # The first token of a reply is predicted at the position before it.
                place = slice(first + start - 1, first + start - 1 + len(text))
                row["targets"][place], row["reply"][place] = text, count
                labels = self.labels(index, reply)
                row["topic"][count] = place_of(labels.topic, self.topics)
                row["split"][count] = place_of(labels.split, self.splits)
                count += 1
            first += size


def place_of(name: str, names: Sequence[str]) -> int:
    """The index of a name; PAD without one."""
    return names.index(name) if name else PAD


class Text(Stage):
    """Trains the LLM. Its validation counts the replies that greedy decoding gives exactly."""

    parts = ("llm",)
    trained = ("llm",)
    example_type = WrittenExamples
    answers = False
    scored = ("llm",)

    def open_data(self, path: str, split: str) -> Dataset | Texts:
        return open_texts(path, split)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Topics and splits of the validation."""
        assert isinstance(self.validation, WrittenExamples)
        return {"topic": self.validation.topics, "split": self.validation.splits}

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The cross-entropy of the replies."""
        hidden = read_texts(model, self.train, batch)
        return token_loss(hidden, batch["targets"], model.llm.logits, self.train.loss_block)

    def measure(self, model: Model, batch: Batch, key: Array) -> dict[str, Array]:
        hidden, block = read_texts(model, self.train, batch), self.train.loss_block
        loss, terms = token_loss(hidden, batch["targets"], model.llm.logits, block)
        hits = token_hits(hidden, batch["targets"], model.llm.logits, block)
        replies, right = count_replies(batch["reply"], hits)
        sums = {"loss": loss, "terms": terms, "replies": replies.sum(), "right": right.sum()}
        for kind, names in self.groups.items():
            of_group = batch[kind][..., None] == jnp.arange(len(names))  # [B, T, names]
            sums[f"replies/{kind}"] = (replies[..., None] & of_group).sum((0, 1))
            sums[f"right/{kind}"] = (right[..., None] & of_group).sum((0, 1))
        return sums

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        measured = super().report(sums) | {
            "right": float(sums["right"]) / max(int(sums["replies"]), 1)
        }
        for kind, names in self.groups.items():
            counts = zip(names, sums[f"right/{kind}"], sums[f"replies/{kind}"], strict=True)
            measured |= {
                f"right/{kind}/{name}": float(right) / int(replies)
                for name, right, replies in counts
                if replies
            }
        return measured


def read_texts(model: Model, train: TrainConfig, batch: Batch) -> Array:
    """Packed rows [B, T] -> hidden states of the LLM [B, T, D]."""
    embedded = model.llm.embed(batch["ids"]).astype(train.dtype)
    hidden, _ = model.llm(
        constrain(embedded, "batch", None, None),
        batch["positions"],
        remat=train.remat,
        segments=batch["dialogue"],
    )
    return hidden


def count_replies(reply: Array, hits: Array) -> tuple[Array, Array]:
    """Which replies there are in each row, and which are right: bool [B, T] each, by their number.

    reply [B, T]: the number of the reply that a position's target belongs to, or PAD. hits [B, T].
    """

    def count(reply: Array, hits: Array) -> tuple[Array, Array]:
        size = len(reply)
        index = jnp.where(reply == PAD, size, reply)  # beyond the end: left out
        tokens = jnp.zeros(size, jnp.int32).at[index].add(1, mode="drop")
        found = jnp.zeros(size, jnp.int32).at[index].add(hits.astype(jnp.int32), mode="drop")
        return tokens > 0, (tokens > 0) & (found == tokens)

    return jax.vmap(count)(reply, hits)

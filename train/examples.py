"""A dialogue as one row of a batch: numpy arrays of the static shape that its bucket gives. C clips, T LLM positions, S tokens.

Each stage looks at other things: I(a) at whole dialogues up to the LLM, I(b) at single replies, II at both, the flow at a reply's
units and recording.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.records import Dialogue, Turn
from omni2_jax.train.hidden_states import States
from omni2_jax.train.layout import arrange
from omni2_jax.train.losses import IGNORE
from omni2_jax.train.settings import Bucket, TrainConfig

CLIP = recordings.TURN_SECONDS * recordings.INPUT_RATE  # samples
PAD = -1  # an id at which there is nothing

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Item:
    """An example: a dialogue, or one of its replies, and the least bucket that holds it."""

    dialogue: int
    turn: int | None
    size: Bucket


@dataclass(frozen=True)
class Conversation:
    """Prompt and replies as the LLM reads them; reply k begins at `starts[k]`, with its end token it is `replies[k]`."""

    ids: np.ndarray  # [T]
    replies: list[list[int]]
    starts: list[int]
    clips: list[int]  # of each user turn


class Examples:
    """The examples of a data set for a stage. `tokenizer` may be None for the flow; `hidden` are states that need not be computed."""

    def __init__(
        self,
        train: TrainConfig,
        config: Omni2Config,
        tokenizer: Tokenizer | None,
        data: Dataset,
        hidden: States | None = None,
    ):
        self.hidden = hidden
        self.train, self.config, self.tokenizer, self.data = train, config, tokenizer, data
        self.whole = train.stage in ("1a", "2")  # dialogues, not replies
        self.continuation = functools.cache(lambda clips: tokenizer.continuation(clips, ended=True))
        self.opening = functools.cache(lambda clips: tokenizer.prompt([clips]))

    def items(self, index: int) -> list[Item]:
        """The examples that a dialogue gives. Raises ValueError, RecordError among them, if it lacks what the stage needs."""
        dialogue = self.data.dialogue(index)
        if not self.whole:
            return [
                Item(index, turn, self.reply_size(dialogue, turn))
                for turn in range(1, len(dialogue.turns), 2)
            ]
        talk = self.conversation(dialogue)
        tokens = 0
        if self.train.stage == "2":
            tokens = max(
                len(self.arrange(turn, text).tokens)
                for turn, text in zip(dialogue.turns[1::2], talk.replies, strict=True)
            )
        return [Item(index, None, Bucket(sum(talk.clips), len(talk.ids), tokens))]

    def reply_size(self, dialogue: Dialogue, turn: int) -> Bucket:
        reply = dialogue.turns[turn]
        if self.train.stage == "flow":
            if reply.clip is None or reply.units is None:
                raise ValueError(
                    f"turn {turn} has no recording or no units, which the flow is trained on"
                )
            return Bucket(0, 0, len(reply.units))
        return Bucket(0, 0, len(self.arrange(reply, self.encode(reply)).tokens))

    def row(self, item: Item, bucket: Bucket) -> Row:
        """The arrays of an example, padded to a bucket. Raises RecordError for a damaged record."""
        dialogue = self.data.dialogue(item.dialogue)
        row = self.empty(bucket)
        if self.train.stage == "flow":
            self.fill_recording(row, dialogue.turns[item.turn])
        elif self.train.stage == "1b":
            reply = dialogue.turns[item.turn]
            laid = self.arrange(reply, self.encode(reply))
            put(row, {"tokens": laid.tokens, "targets": laid.targets})
        else:
            self.fill_conversation(row, item, dialogue)
        return row

    def empty(self, bucket: Bucket) -> Row:
        """A row in which there is nothing: it has no loss."""
        c, t, s = bucket.clips, bucket.positions, bucket.tokens
        full = lambda shape, value: np.full(shape, value, np.int32)  # noqa: E731
        dialogue = {"audio": np.zeros((c, CLIP), np.int16), "ids": full(t, PAD)}
        if self.hidden:
            dialogue = {"hidden": np.zeros((t, self.hidden.width), self.hidden.dtype)}
        match self.train.stage:
            case "1a":
                return dialogue | {"targets": full(t, IGNORE)}
            case "1b":
                return {"tokens": full(s, PAD), "targets": full(s, IGNORE)}
            case "2":
                return dialogue | {
                    "tokens": full((c, s), PAD),
                    "targets": full((c, s), IGNORE),
                    "source": full((c, s), PAD),
                }
        speech, heard = (
            s * recordings.OUTPUT_RATE // UNITS_PER_SECOND,
            s * recordings.INPUT_RATE // UNITS_PER_SECOND,
        )
        return {
            "units": full(s, PAD),
            "speech": np.zeros(speech, np.int16),
            "heard": np.zeros(heard, np.int16),
        }

    def fill_conversation(self, row: Row, item: Item, dialogue: Dialogue) -> None:
        talk = self.conversation(dialogue)
        if self.train.stage == "1a":
            for start, text in zip(talk.starts, talk.replies, strict=True):
                row["targets"][start - 1 : start - 1 + len(text)] = text
        else:
            self.fill_replies(row, dialogue, talk)
        if self.hidden:
            put(row, {"hidden": self.hidden.read(item.dialogue, sum(map(len, talk.replies)))})
            return
        clips = [
            clip
            for turn in dialogue.turns[::2]
            for clip in recordings.fit(self.data.clip(turn.clip), over="split")
        ]
        if len(clips) != sum(talk.clips):
            raise RecordError(
                f"{self.data.path}: dialogue {dialogue.id!r} has {len(clips)} clips, its turns tell of {sum(talk.clips)}"
            )
        for i, clip in enumerate(clips):
            put_at(row["audio"], (i,), recordings.to_int16(clip))
        put(row, {"ids": talk.ids})

    def fill_replies(self, row: Row, dialogue: Dialogue, talk: Conversation) -> None:
        """What the speech LM hears and says; and where the state is that produced a text token: at the position before it."""
        before = 0  # text tokens of earlier replies, all of whose states lie side by side when they come from the disk
        for i, (start, text) in enumerate(zip(talk.starts, talk.replies, strict=True)):
            laid = self.arrange(dialogue.turns[2 * i + 1], text)
            source = np.where(
                laid.source >= 0, (before if self.hidden else start - 1) + laid.source, PAD
            )
            for name, value in {
                "tokens": laid.tokens,
                "targets": laid.targets,
                "source": source,
            }.items():
                put_at(row[name], (i,), value)
            before += len(text)

    def fill_recording(self, row: Row, reply: Turn) -> None:
        """A recording and its units are cut to the shorter of the two, whole units."""
        samples = self.data.clip(reply.clip)
        units = reply.units[: len(samples) * UNITS_PER_SECOND // recordings.OUTPUT_RATE]
        speech = samples[: len(units) * recordings.OUTPUT_RATE // UNITS_PER_SECOND]
        put(
            row,
            {
                "units": units,
                "speech": recordings.to_int16(speech),
                "heard": recordings.to_int16(
                    recordings.resample(speech, recordings.OUTPUT_RATE, recordings.INPUT_RATE)
                ),
            },
        )

    def conversation(self, dialogue: Dialogue) -> Conversation:
        if any(turn.clip is None for turn in dialogue.turns[::2]):
            raise ValueError("a user turn has no recording")
        clips = [-(-turn.samples // CLIP) for turn in dialogue.turns[::2]]
        replies = [self.encode(turn) for turn in dialogue.turns[1::2]]
        ids, starts = list(self.opening(clips[0])), []
        for i, text in enumerate(replies):
            starts.append(len(ids))
            ids += [*text, *(self.continuation(clips[i + 1]) if i + 1 < len(clips) else [])]
        return Conversation(np.array(ids, np.int32), replies, starts, clips)

    def encode(self, reply: Turn) -> list[int]:
        """A reply's token ids with the end token, which the speech LM hears too."""
        ids = self.tokenizer.text.encode(reply.text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"the reply {reply.text!r} has no tokens")
        return [*ids, self.config.tokens.text_eos[0]]

    def arrange(self, reply: Turn, text: Sequence[int]):
        if reply.units is None:
            raise ValueError(
                "a reply has no units; python -m train.prepare makes them from recordings with --speech-tokenizer"
            )
        return arrange(
            text, reply.units.tolist(), self.config, offline=self.train.layout == "offline"
        )


UNITS_PER_SECOND = 25


def put(row: Row, values: dict[str, np.ndarray]) -> None:
    """Write values at the start of the row's arrays of the same name."""
    for name, value in values.items():
        put_at(row[name], (), value)


def put_at(array: np.ndarray, index: tuple, value: np.ndarray) -> None:
    array[(*index, slice(None, len(value)))] = value

"""Whole dialogues as rows of a batch: what the LLM reads in the stages 1a and 2. C segments, T LLM
positions.
"""

import functools
from dataclasses import dataclass

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.config import Omni2Config
from omni2_jax.train.data.dataset import RecordError
from omni2_jax.train.data.records import Dialogue
from omni2_jax.train.encoder_frames import EncoderFrames
from omni2_jax.train.examples import PAD, Examples, Item, Row, full, put
from omni2_jax.train.settings import Bucket


@dataclass(frozen=True)
class Conversation:
    """A dialogue as the LLM reads it. Reply k with its end token starts at `starts[k]`."""

    ids: np.ndarray  # [T]; SPEECH where a speech feature goes
    replies: list[list[int]]
    starts: list[int]
    segments: list[int]  # windows of the speech encoder in each user turn

    @property
    def text_tokens(self) -> int:
        return sum(map(len, self.replies))


class DialogueExamples(Examples):
    """Examples that are whole dialogues. Subclasses add what the loss needs."""

    frames: EncoderFrames | None = None  # if they are on disk, no recording is read

    def items(self, index: int) -> list[Item]:
        dialogue = self.data.dialogue(index)
        conversation = self.conversation(dialogue)
        tokens = self.reply_tokens(dialogue, conversation)
        size = Bucket(sum(conversation.segments), len(conversation.ids), tokens)
        return [Item(index, None, size)]

    def reply_tokens(self, dialogue: Dialogue, conversation: Conversation) -> int:
        """Speech LM tokens of the longest reply; 0 for a stage without the speech LM."""
        return 0

    def empty(self, bucket: Bucket) -> Row:
        ids = {"ids": full(bucket.positions, PAD)}
        if self.frames is None:
            audio = np.zeros((bucket.segments, self.config.segment_samples), np.int16)
            return {"audio": audio} | ids
        assert self.config.speech_encoder is not None
        shape = (bucket.segments, self.config.speech_encoder.frames, self.frames.width)
        return {"frames": np.zeros(shape, self.frames.dtype)} | ids

    def fill_questions(
        self, row: Row, index: int, dialogue: Dialogue, conversation: Conversation
    ) -> None:
        """Write the ids of dialogue `index` and the recordings of its user turns, or their frames.

        Raises RecordError if a recording is not as long as its turn states.
        """
        put(row, {"ids": conversation.ids})
        if self.frames is not None:
            count, (_, size, width) = sum(conversation.segments), row["frames"].shape
            values = self.frames.read(index, count * size)
            put(row, {"frames": values.reshape(count, size, width)})
            return
        window = self.config.segment_samples
        segments = [
            segment
            for turn in dialogue.turns[::2]
            if turn.clip is not None
            for segment in recordings.fit(self.data.clip(turn.clip), "split", window)
        ]
        if len(segments) != sum(conversation.segments):
            raise RecordError(
                f"{self.data.path}: dialogue {dialogue.id!r} has {len(segments)} segments, "
                f"but its turns state lengths of {sum(conversation.segments)} segments"
            )
        for i, segment in enumerate(segments):
            put(row, {"audio": recordings.to_int16(segment)}, (i,))

    def conversation(self, dialogue: Dialogue) -> Conversation:
        """The prompts and replies of a dialogue as token ids.

        Raises ValueError if there is no question, a user turn has no recording or a reply no
        tokens.
        """
        if dialogue.is_recording:
            raise ValueError("it is a recording with its text, without a question")
        if any(turn.clip is None for turn in dialogue.turns[::2]):
            raise ValueError("a user turn has no recording")
        window = self.config.segment_samples
        segments = [-(-turn.samples // window) for turn in dialogue.turns[::2]]
        replies = [self.encode(turn) for turn in dialogue.turns[1::2]]
        ids, starts = list(self.first_prompt(segments[0])), []
        for i, text in enumerate(replies):
            starts.append(len(ids))
            ids += [*text, *(self.next_prompt(segments[i + 1]) if i + 1 < len(segments) else [])]
        return Conversation(np.array(ids, np.int32), replies, starts, segments)

    @functools.cached_property
    def first_prompt(self):
        """The number of segments of the first question -> ids. Cached: the tokenizer is slow."""
        assert self.tokenizer is not None
        tokenizer = self.tokenizer
        return functools.cache(lambda segments: tokenizer.prompt([segments]))

    @functools.cached_property
    def next_prompt(self):
        """The number of segments of a later question -> ids between the replies. Cached, too."""
        assert self.tokenizer is not None
        return functools.cache(functools.partial(self.tokenizer.continuation, ended=True))


def speech_positions(config: Omni2Config) -> int:
    """LLM positions of one segment (300 for a window of 30 s); 0 without a speech encoder."""
    if config.speech_encoder is None or config.adapter is None:
        return 0
    return config.speech_positions

"""Stage II: speech to speech. Gate fusion and the speech LM learn to speak from the LLM's hidden
states (paper section 4.1).

The loss is that of stage 1b. B batch, C segments (and replies), T LLM positions, S tokens of the
speech LM, D LLM width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.models.model import Model
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.records import Dialogue
from omni2_jax.train.dialogues import Conversation, DialogueExamples
from omni2_jax.train.encoder_frames import EncoderFrames
from omni2_jax.train.examples import PAD, Item, Row, full, put
from omni2_jax.train.hidden_states import HiddenStates
from omni2_jax.train.losses import IGNORE
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss
from omni2_jax.train.stages.speech_to_text import encode_questions, read_dialogue
from omni2_jax.train.stages.text_to_speech import UnitWriting, unit_loss


class SpeechExamples(DialogueExamples):
    """Dialogues and the units of their replies. With `hidden` states no question is read."""

    hidden: HiddenStates | None = None

    def reply_tokens(self, dialogue: Dialogue, conversation: Conversation) -> int:
        pairs = zip(dialogue.turns[1::2], conversation.replies, strict=True)
        return max(len(self.arrange(turn, text).tokens) for turn, text in pairs)

    def empty(self, bucket: Bucket) -> Row:
        replies = (bucket.segments, bucket.tokens)
        row = {
            "tokens": full(replies, PAD),
            "targets": full(replies, IGNORE),
            "source": full(replies, PAD),  # the position whose hidden state produced a text token
        }
        if self.hidden is None:
            return super().empty(bucket) | row
        states = np.zeros((bucket.positions, self.hidden.width), self.hidden.dtype)
        return {"hidden": states} | row

    def fill(self, row: Row, item: Item) -> None:
        dialogue = self.data.dialogue(item.dialogue)
        conversation = self.conversation(dialogue)
        self.fill_replies(row, dialogue, conversation)
        if self.hidden is None:
            self.fill_questions(row, item.dialogue, dialogue, conversation)
        else:
            put(row, {"hidden": self.hidden.read(item.dialogue, conversation.text_tokens)})

    def fill_replies(self, row: Row, dialogue: Dialogue, conversation: Conversation) -> None:
        """Write tokens, targets and sources of all replies.

        A text token was produced by the hidden state at the position before it. On disk only these
        states are kept, those of all replies one after the other.
        """
        stored = 0  # text tokens of earlier replies
        replies = zip(conversation.starts, conversation.replies, strict=True)
        for i, (start, text) in enumerate(replies):
            layout = self.arrange(dialogue.turns[2 * i + 1], text)
            first = start - 1 if self.hidden is None else stored
            source = np.where(layout.source >= 0, first + layout.source, PAD)
            values = {"tokens": layout.tokens, "targets": layout.targets, "source": source}
            put(row, values, (i,))
            stored += len(text)


class SpeechToSpeech(UnitWriting):
    """Trains gate fusion and the speech LM; the speech encoder, the adapter and the LLM are frozen.

    If the setting `hidden` is given, the LLM's hidden states come from the disk and the frozen
    parts are not loaded.
    """

    parts = ("speech_encoder", "adapter", "llm", "fusion", "speech_lm")
    trained = ("fusion", "speech_lm")
    settings = (*UnitWriting.settings, "mix", "frames", "hidden")
    example_type = SpeechExamples

    @property
    def loaded(self) -> tuple[str, ...]:
        if self.train.hidden:
            return self.trained
        return self.parts[1:] if self.train.frames else self.parts

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        both = train.frames and train.hidden
        faults = ["frames are not read with hidden; expected one of them"] if both else []
        return faults + super().faults(train)

    def configure(self, config: Omni2Config) -> Omni2Config:
        return config.replace(mix=self.train.mix)

    def drawn(self, config: Omni2Config) -> set[str]:
        """A fusion that mixes in another way than the checkpoint's starts at random, too."""
        return super().drawn(config) | ({"fusion"} if self.train.mix != config.mix else set())

    def examples(
        self, config: Omni2Config, tokenizer: Tokenizer | None, data: Dataset, split: str
    ) -> SpeechExamples:
        examples = SpeechExamples(self.train, config, tokenizer, data)
        examples.frames = EncoderFrames.of(self.train, config, data, split)
        examples.hidden = HiddenStates.of(self.train, config, data, split)
        return examples

    def writing_loss(self, model: Model, batch: Batch) -> Loss:
        if self.train.hidden:
            hidden = batch["hidden"].astype(self.train.dtype)
        else:
            hidden = jax.lax.stop_gradient(read_dialogue(model, self.train, batch))
        return reply_loss(model, self.train, hidden, batch)

    def frozen_work(self):
        def encoder(model: Model, batch: Batch) -> Array:
            return encode_questions(model, self.train, batch)

        def language_model(model: Model, batch: Batch) -> Array:
            return read_dialogue(model, self.train, batch)

        return {
            "features, speech encoder": encoder,
            "the same, adapter, LLM": language_model,
        }


def reply_loss(model: Model, train: TrainConfig, hidden: Array, batch: Batch) -> Loss:
    """The loss of replies [B, C, S] given the LLM's hidden states [B, T, D].

    source [B, C, S]: the position whose state produced a text token, -1 for units, <sep> and eos.
    """
    indices = jnp.maximum(batch["source"], 0)
    producing = jnp.take_along_axis(hidden[:, None], indices[..., None], axis=2)  # [B, C, S, D]

    def merge_replies(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    tokens, source = merge_replies(batch["tokens"]), merge_replies(batch["source"])
    embedded = model.speech_lm.embed(tokens).astype(hidden.dtype)
    fused = model.fuse(merge_replies(producing), jnp.maximum(tokens, 0))
    inputs = jnp.where((source >= 0)[..., None], fused, embedded)
    return unit_loss(model, train, inputs, tokens, merge_replies(batch["targets"]))

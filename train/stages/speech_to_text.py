"""Stage I(a): speech to text. The adapter and the LLM learn to answer spoken questions in text
(paper section 4.1).

The loss is the cross-entropy of the assistant's text. B batch, C segments, N samples, T LLM
positions, D LLM width.
"""

from dataclasses import replace

import jax

from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.dialogues import DialogueExamples
from omni2_jax.train.encoder_frames import EncoderFrames
from omni2_jax.train.examples import Item, Row, full
from omni2_jax.train.losses import IGNORE, token_loss
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage, positions


class TextExamples(DialogueExamples):
    """Dialogues, and as targets the text of their replies."""

    def empty(self, bucket: Bucket) -> Row:
        return super().empty(bucket) | {"targets": full(bucket.positions, IGNORE)}

    def fill(self, row: Row, item: Item) -> None:
        dialogue = self.data.dialogue(item.dialogue)
        conversation = self.conversation(dialogue)
        for start, text in zip(conversation.starts, conversation.replies, strict=True):
            row["targets"][start - 1 : start - 1 + len(text)] = text
        self.fill_questions(row, item.dialogue, dialogue, conversation)


class SpeechToText(Stage):
    """Trains the adapter and the LLM, or with the setting `rank` low-rank updates of it (LoRA)."""

    parts = ("speech_encoder", "adapter", "llm")
    trained = ("adapter", "llm")
    settings = ("rank", "frames")
    example_type = TextExamples
    scored = ("llm",)

    @property
    def loaded(self) -> tuple[str, ...]:
        return self.trained if self.train.frames else self.parts

    def examples(
        self, config: Omni2Config, tokenizer: Tokenizer | None, data: Dataset, split: str
    ) -> TextExamples:
        examples = TextExamples(self.train, config, tokenizer, data)
        examples.frames = EncoderFrames.of(self.train, config, data, split)
        return examples

    def is_trained(self, path: str) -> bool:
        if self.train.rank and path.startswith("llm."):
            return path.rpartition(".")[2] in ("low", "high")
        return super().is_trained(path)

    def train_config(self, config: Omni2Config) -> Omni2Config:
        config = self.model_config(config)
        if not self.train.rank or config.llm is None:
            return config
        return config.replace(llm=replace(config.llm, rank=self.train.rank))

    def sample_config(self, config: Omni2Config) -> Omni2Config:
        # Gate fusion is not trained before stage 2; in stage 1b the speech LM reads the text alone.
        return config.replace(mix="text")

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The cross-entropy of the replies' text."""
        hidden = read_dialogue(model, self.train, batch)
        return token_loss(hidden, batch["targets"], model.llm.logits, self.train.loss_block)

    def frozen_work(self):
        def encoder(model: Model, batch: Batch) -> Array:
            return encode_questions(model, self.train, batch)

        return {"features, speech encoder": encoder}


def encode_questions(model: Model, train: TrainConfig, batch: Batch) -> Array:
    """Recordings [B, C, N] int16 -> frames of the frozen speech encoder [B * C, frames, width].

    Frames [B, C, frames, width] that come from the disk are taken as they are.
    """
    if "frames" in batch:
        return batch["frames"].reshape(-1, *batch["frames"].shape[2:]).astype(train.dtype)
    rows, segments, samples = batch["audio"].shape
    audio = recordings.from_int16(batch["audio"].reshape(rows * segments, samples))
    mel = features.log_mel(constrain(audio, "batch", None), mels=model.config.speech_encoder.mels)
    return jax.lax.stop_gradient(model.speech_encoder(mel.astype(train.dtype)))


def read_dialogue(model: Model, train: TrainConfig, batch: Batch) -> Array:
    """Recordings [B, C, N] int16 and ids [B, T] of dialogues -> LLM hidden states [B, T, D]."""
    speech = model.adapter(encode_questions(model, train, batch))
    speech = speech.reshape(len(batch["ids"]), -1, speech.shape[-1])
    inputs = constrain(model.embed_prompt(batch["ids"], speech), "batch", None, None)
    hidden, _ = model.llm(inputs, positions(batch["ids"]), remat=train.remat)
    return hidden

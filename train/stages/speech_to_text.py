"""Stage 1a: speech to text. The adapter and the LLM learn to answer spoken questions in text
(paper section 4.1).

The loss is the cross-entropy of the assistant's text. A little LLM forgets its text unless some of
it is replayed, and hears sooner with a small CTC loss: the settings `replay` and `ctc`. An adapter
that starts from nothing learns fastest by CTC alone, without the LLM: the setting `ctc_steps`. With
few recordings, `mel_masks` hides parts of what is heard.
B batch, C segments, N samples, F speech features of a segment, T LLM positions, D LLM width,
V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.records import Dialogue
from omni2_jax.train.data.texts import Texts
from omni2_jax.train.dialogues import Conversation, DialogueExamples
from omni2_jax.train.encoder_frames import EncoderFrames
from omni2_jax.train.examples import PAD, Item, Row, full, put
from omni2_jax.train.losses import IGNORE, token_loss
from omni2_jax.train.masking import masked
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage, positions
from omni2_jax.train.written import open_texts, written


class TextExamples(DialogueExamples):
    """Dialogues, and as targets the text of their replies.

    texts: dialogues as text, which make up the share `replay` of all rows. The larger of both data
    sets is used once in an epoch, and the other one again and again.
    """

    def __init__(
        self,
        train: TrainConfig,
        config: Omni2Config,
        tokenizer: Tokenizer | None,
        data: Dataset,
        texts: Dataset | Texts | None = None,
    ):
        super().__init__(train, config, tokenizer, data)
        self.texts, self.copies, self.num_texts = texts, 1, 0
        if texts is not None:
            ratio = train.replay / (1 - train.replay)  # texts for each dialogue
            self.copies = max(1, round(len(texts) / ratio / len(data)))
            self.num_texts = round(self.copies * len(data) * ratio)

    def __len__(self) -> int:
        return self.copies * len(self.data) + self.num_texts

    def place(self, index: int) -> tuple[Dataset | Texts, int]:
        """Where `items(index)` finds its dialogue, and the dialogue's number there."""
        number = index - self.copies * len(self.data)
        if self.texts is None or number < 0:
            return self.data, index % len(self.data)
        return self.texts, number % len(self.texts)

    def name(self, index: int) -> str:
        place, number = self.place(index)
        return super().name(number) + ("" if place is self.data else f" of {place.path}")

    def items(self, index: int) -> list[Item]:
        """As for all examples; the dialogue of an item that is a text is a negative number."""
        place, number = self.place(index)
        if place is self.data:
            return super().items(number)
        size = len(written(self, place.dialogue(number)).ids)
        return [Item(-1 - number, None, Bucket(0, size, 0))]

    def empty(self, bucket: Bucket) -> Row:
        row = super().empty(bucket) | {"targets": full(bucket.positions, IGNORE)}
        if self.train.ctc:
            row["question"] = full((bucket.segments, self.config.speech_positions), PAD)
        return row

    def fill(self, row: Row, item: Item) -> None:
        if item.dialogue < 0:
            assert self.texts is not None
            text = written(self, self.texts.dialogue(-1 - item.dialogue))
            put(row, {"ids": text.ids})
            put_targets(row, text.starts, text.replies)
            return
        dialogue = self.data.dialogue(item.dialogue)
        conversation = self.conversation(dialogue)
        put_targets(row, conversation.starts, conversation.replies)
        if self.train.ctc:
            self.fill_labels(row, dialogue, conversation)
        self.fill_questions(row, item.dialogue, dialogue, conversation)

    def fill_labels(self, row: Row, dialogue: Dialogue, conversation: Conversation) -> None:
        """Write the text of every question that takes one segment and fits its positions.

        One whose words are not known has no text.
        """
        assert self.tokenizer is not None
        segment = 0
        for question, count in zip(dialogue.turns[::2], conversation.segments, strict=True):
            ids = self.tokenizer.answer(question.text)
            if question.is_written and count == 1 and len(ids) <= row["question"].shape[1]:
                put(row, {"question": np.array(ids, np.int32)}, (segment,))
            segment += count


def put_targets(row: Row, starts: Sequence[int], replies: Sequence[Sequence[int]]) -> None:
    """Write the targets of replies; the first token is predicted at the position before it."""
    for start, text in zip(starts, replies, strict=True):
        row["targets"][start - 1 : start - 1 + len(text)] = text


class SpeechToText(Stage):
    """Trains the adapter and the LLM, or with the setting `rank` low-rank updates of it (LoRA)."""

    parts = ("speech_encoder", "adapter", "llm")
    trained = ("adapter", "llm")
    settings = ("rank", "frames", "replay", "replay_data", "ctc", "ctc_steps", "mel_masks")
    example_type = TextExamples
    scored = ("llm",)

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        faults = []
        if not 0 <= train.replay < 1:
            faults.append(f"replay is {train.replay}, expected at least 0 and less than 1")
        if train.ctc < 0:
            faults.append(f"ctc is {train.ctc}, expected at least 0")
        if train.replay_data and not train.replay:
            faults.append("replay_data is given, but replay is 0")
        if train.ctc_steps and not train.ctc:
            faults.append("ctc_steps is given, but ctc is 0")
        if train.mel_masks and train.frames:
            faults.append("mel_masks changes what the speech encoder reads: frames is left out")
        return faults

    @property
    def loaded(self) -> tuple[str, ...]:
        return self.trained if self.train.frames else self.parts

    def examples(
        self, config: Omni2Config, tokenizer: Tokenizer | None, data: Dataset, split: str
    ) -> TextExamples:
        texts = None
        if self.train.replay and split == "data":
            texts = open_texts(self.train.replay_data or self.train.data, split)
        examples = TextExamples(self.train, config, tokenizer, data, texts)
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

    def phase(self, number: int) -> str:
        return "ctc" if number < self.train.ctc_steps else ""

    def loss_in(self, phase: str):
        return self.ctc_loss if phase == "ctc" else self.loss

    def ctc_loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """`hearing_loss` alone, for which the LLM does not run; of replayed text the usual loss.

        The LLM's embeddings change with the adapter: compared with constant ones, the CTC loss of
        held-out questions stayed twice as high.
        """
        if not batch["question"].size:
            return self.loss(model, batch, key)
        return hearing_loss(model, hear(model, self.train, batch, key), batch["question"])

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The cross-entropy of the replies' text; with the setting `ctc` also `hearing_loss`.

        Both are means over their tokens, added with the weight `ctc`.
        """
        speech = hear(model, self.train, batch, key)
        hidden = read(model, self.train, batch, speech)
        loss, terms = token_loss(hidden, batch["targets"], model.llm.logits, self.train.loss_block)
        if self.train.ctc and batch["question"].size:  # rows of replayed text have no questions
            heard, tokens = hearing_loss(model, speech, batch["question"])
            loss += self.train.ctc * terms * heard / jnp.maximum(tokens, 1)
        return loss, terms

    def measure(self, model: Model, batch: Batch, key: Array) -> dict[str, Array]:
        speech = hear(model, self.train, batch)
        hidden = read(model, self.train, batch, speech)
        loss, terms = token_loss(hidden, batch["targets"], model.llm.logits, self.train.loss_block)
        sums = {"loss": loss, "terms": terms}
        if self.train.ctc:
            sums["heard"], sums["tokens"] = hearing_loss(model, speech, batch["question"])
        return sums

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        report = super().report(sums)
        if self.train.ctc:
            report["validation_ctc"] = float(sums["heard"]) / max(int(sums["tokens"]), 1)
        return report

    def frozen_work(self):
        def encoder(model: Model, batch: Batch) -> Array:
            return encode_questions(model, self.train, batch)

        return {"features, speech encoder": encoder}


def encode_questions(
    model: Model, train: TrainConfig, batch: Batch, key: Array | None = None
) -> Array:
    """Recordings [B, C, N] int16 -> frames of the frozen speech encoder [B * C, frames, width].

    Frames [B, C, frames, width] that come from the disk are taken as they are. key: of training, in
    which the setting `mel_masks` hides parts of the recordings.
    """
    if "frames" in batch:
        return batch["frames"].reshape(-1, *batch["frames"].shape[2:]).astype(train.dtype)
    rows, segments, samples = batch["audio"].shape
    audio = recordings.from_int16(batch["audio"].reshape(rows * segments, samples))
    mel = features.log_mel(constrain(audio, "batch", None), mels=model.config.speech_encoder.mels)
    if train.mel_masks and key is not None:
        mel = masked(mel, train.mel_masks, key)
    return jax.lax.stop_gradient(model.speech_encoder(mel.astype(train.dtype)))


def hear(model: Model, train: TrainConfig, batch: Batch, key: Array | None = None) -> Array:
    """Recordings [B, C, N] int16, or their frames, -> speech features [B, C * F, D]."""
    speech = model.adapter(encode_questions(model, train, batch, key))
    return speech.reshape(len(batch["ids"]), -1, speech.shape[-1])


def read(model: Model, train: TrainConfig, batch: Batch, speech: Array) -> Array:
    """Speech features [B, C * F, D] and ids [B, T] of dialogues -> LLM hidden states [B, T, D]."""
    inputs = constrain(model.embed_prompt(batch["ids"], speech), "batch", None, None)
    hidden, _ = model.llm(inputs, positions(batch["ids"]), remat=train.remat)
    return hidden


def read_dialogue(model: Model, train: TrainConfig, batch: Batch) -> Array:
    """Recordings [B, C, N] int16 and ids [B, T] of dialogues -> LLM hidden states [B, T, D]."""
    return read(model, train, batch, hear(model, train, batch))


def hearing_loss(model: Model, speech: Array, question: Array) -> Loss:
    """The CTC loss of the questions' text, and its number of tokens: what the adapter alone heard.

    speech [B, C * F, D]: its features, which are compared with the LLM's embeddings; <speech> is
    the blank. question [B, C, F]: token ids of each segment, or PAD. All logits [B, C, F, V] are in
    memory, so it is for small vocabularies. Reference: Graves et al. 2006.
    """
    labels = question.reshape(-1, question.shape[-1])
    features = speech.reshape(*labels.shape, -1)  # as many features as there is place for labels
    table = model.llm.embedding.table[...].astype(features.dtype)
    logits = jnp.einsum("...D,VD->...V", features, table)
    missing = (labels == PAD).astype(jnp.float32)
    losses = optax.ctc_loss(
        logits.astype(jnp.float32),
        jnp.zeros(labels.shape),
        jnp.maximum(labels, 0),
        missing,
        blank_id=model.config.tokens.speech,
    )
    has_text = labels[:, 0] != PAD
    return jnp.sum(jnp.where(has_text, losses, 0)), jnp.sum(labels != PAD)

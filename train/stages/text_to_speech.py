"""Stage I(b): text to speech. The speech LM learns to write units after text (paper section 4.1).

The loss is the cross-entropy of the units in the read/write layout (layout.py). B batch, S tokens,
D width.
"""

from omni2_jax.config import Omni2Config
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain
from omni2_jax.train.data.records import Turn
from omni2_jax.train.examples import PAD, Item, ReplyExamples, Row, full, put
from omni2_jax.train.losses import IGNORE, token_loss
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage, positions


class UnitExamples(ReplyExamples):
    """Single replies: text and units in the layout of the speech LM."""

    def reply_size(self, turn: int, reply: Turn) -> int:
        return len(self.arrange(reply, self.encode(reply)).tokens)

    def empty(self, bucket: Bucket) -> Row:
        return {"tokens": full(bucket.tokens, PAD), "targets": full(bucket.tokens, IGNORE)}

    def fill(self, row: Row, item: Item) -> None:
        reply = self.reply(item)
        layout = self.arrange(reply, self.encode(reply))
        put(row, {"tokens": layout.tokens, "targets": layout.targets})


class TextToSpeech(Stage):
    """Trains the speech LM on the embeddings of the text, without the LLM."""

    parts = ("speech_lm",)
    trained = ("speech_lm",)
    settings = ("layout",)
    example_type = UnitExamples
    scored = ("speech_lm",)

    def sample_config(self, config: Omni2Config) -> Omni2Config:
        # The speech LM reads the text alone, as in training: gate fusion is not trained before
        # stage 2.
        return config.replace(mix="text")

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The cross-entropy of the units, given the embeddings of the text."""
        inputs = model.speech_lm.embed(batch["tokens"]).astype(self.train.dtype)
        return unit_loss(model, self.train, inputs, batch["tokens"], batch["targets"])


def unit_loss(
    model: Model, train: TrainConfig, inputs: Array, tokens: Array, targets: Array
) -> Loss:
    """The speech LM's cross-entropy, from embeddings [B, S, D] of tokens and targets [B, S]."""
    inputs = constrain(inputs, "batch", None, None)
    hidden, _ = model.speech_lm(inputs, positions(tokens), remat=train.remat)
    return token_loss(hidden, targets, model.speech_lm.logits, train.loss_block)

"""Stage 1b: text to speech. The speech LM learns to write units after text (paper section 4.1).

The loss is the cross-entropy of the units in the read/write layout (layout.py). B batch, S tokens,
D width.

In training the speech LM reads the units of a recording, in generation its own. It learns a small
data set by heart, and then goes wrong after its first unit that differs from the recording. With
the setting `unit_noise` some of the units that it reads are wrong, so that it must read the text.
"""

import abc

import jax
import jax.numpy as jnp

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


class UnitWriting(Stage):
    """A stage in which the speech LM learns to write units."""

    settings = ("layout", "unit_noise")
    scored = ("speech_lm",)
    reads_units = True

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        if 0 <= train.unit_noise < 1:
            return []
        return [f"unit_noise is {train.unit_noise}, expected at least 0 and less than 1"]

    @abc.abstractmethod
    def writing_loss(self, model: Model, batch: Batch) -> Loss:
        """The cross-entropy of the units, `batch["targets"]`, after `batch["tokens"]`."""

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """`writing_loss`, with noise in the units that are read."""
        if self.train.unit_noise:
            tokens = noisy_units(batch["tokens"], self.train.unit_noise, model.config, key)
            batch = {**batch, "tokens": tokens}
        return self.writing_loss(model, batch)

    def measure(self, model: Model, batch: Batch, key: Array) -> dict[str, Array]:
        loss, terms = self.writing_loss(model, batch)
        return {"loss": loss, "terms": terms}


class TextToSpeech(UnitWriting):
    """Trains the speech LM on the embeddings of the text, without the LLM."""

    parts = ("speech_lm",)
    trained = ("speech_lm",)
    example_type = UnitExamples

    def sample_config(self, config: Omni2Config) -> Omni2Config:
        # The speech LM reads the text alone, as in training: gate fusion is not trained before
        # stage 2.
        return config.replace(mix="text")

    def writing_loss(self, model: Model, batch: Batch) -> Loss:
        inputs = model.speech_lm.embed(batch["tokens"]).astype(self.train.dtype)
        return unit_loss(model, self.train, inputs, batch["tokens"], batch["targets"])


def unit_loss(
    model: Model, train: TrainConfig, inputs: Array, tokens: Array, targets: Array
) -> Loss:
    """The speech LM's cross-entropy, from embeddings [B, S, D] of tokens and targets [B, S]."""
    inputs = constrain(inputs, "batch", None, None)
    hidden, _ = model.speech_lm(inputs, positions(tokens), remat=train.remat)
    return token_loss(hidden, targets, model.speech_lm.logits, train.loss_block)


def noisy_units(tokens: Array, share: float, config: Omni2Config, key: Array) -> Array:
    """Tokens of the speech LM [...], with random units in the place of this share of the units."""
    first = config.tokens.sep + 1
    is_unit = (tokens >= first) & (tokens < first + config.units)
    places, values = jax.random.split(key)
    chosen = is_unit & (jax.random.uniform(places, tokens.shape) < share)
    random = jax.random.randint(values, tokens.shape, first, first + config.units, tokens.dtype)
    return jnp.where(chosen, random, tokens)

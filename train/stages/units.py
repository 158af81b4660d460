"""Stage "units": train the speech tokenizer on recordings of a voice, or of many, with their text.

The units have to tell what is said (CTC on characters) and how it sounds (the mel frames that the
flow will make of them). B batch, T units, K digits, M mel bins. Reference: CosyVoice 2 (arXiv
2412.10117), section 2.2, which trains for recognition alone, with an attention decoder.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from omni2_jax import remote
from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import (
    FRAMES_PER_UNIT,
    UNITS_PER_SECOND,
    Omni2Config,
    SpeechTokenizerConfig,
)
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.layers import inside
from omni2_jax.models.speech_tokenizer import LEVELS, STRIDE, SpeechTokenizer, straight_through
from omni2_jax.train import whisper_weights
from omni2_jax.train.data.records import Turn
from omni2_jax.train.examples import PAD, Item, ReplyExamples, Row, full, put
from omni2_jax.train.settings import Bucket
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage
from omni2_jax.train.unit_heads import BLANK, MELS, UnitHeads, edit_distance, greedy, labels_of

OUTPUT_SAMPLES = recordings.OUTPUT_RATE // UNITS_PER_SECOND  # 960 of a unit, at 24 kHz
INPUT_SAMPLES = recordings.INPUT_RATE // UNITS_PER_SECOND  # 640 of a unit, at 16 kHz

# Weights beside the CTC loss of a unit: the mel frames' error, and what keeps the digits alive.
MEL_WEIGHT, SPREAD_WEIGHT = 1.0, 0.1


class SpokenText(ReplyExamples):
    """Single recordings and the bytes of their text. A row's `tokens` are units."""

    def reply_size(self, turn: int, reply: Turn) -> int:
        if reply.clip is None:
            raise ValueError(f"turn {turn} has no recording, which the tokenizer is trained on")
        units, labels = reply.samples // OUTPUT_SAMPLES, labels_of(reply.text)
        if not len(labels):
            raise ValueError(f"the text {reply.text!r} has no letter and no digit")
        # Two frames a unit, and a blank between equal letters: so many can always be aligned.
        if len(labels) > units:
            raise ValueError(
                f"its text is too long for its recording ({len(labels)} bytes in {units} units,"
                " expected at most one a unit)"
            )
        return units

    def empty(self, bucket: Bucket) -> Row:
        return {
            "length": np.zeros(1, np.int32),  # in units
            "labels": full(bucket.tokens, PAD),
            "audio_24k": np.zeros(bucket.tokens * OUTPUT_SAMPLES, np.int16),
            "audio_16k": np.zeros(bucket.tokens * INPUT_SAMPLES, np.int16),
        }

    def fill(self, row: Row, item: Item) -> None:
        """The recording is cut to whole units."""
        reply = self.reply(item)
        assert reply.clip is not None
        speech = self.data.clip(reply.clip)[: item.size.tokens * OUTPUT_SAMPLES]
        narrow = recordings.resample(speech, recordings.OUTPUT_RATE, recordings.INPUT_RATE)
        put(
            row,
            {
                "length": np.array([item.size.tokens]),
                "labels": labels_of(reply.text),
                "audio_24k": recordings.to_int16(speech),
                "audio_16k": recordings.to_int16(narrow),
            },
        )


class TokenizerInTraining(nnx.Module):
    """The speech tokenizer and what reads its units."""

    def __init__(self, config: SpeechTokenizerConfig, rngs: nnx.Rngs):
        self.speech_tokenizer = SpeechTokenizer(config, rngs)
        self.heads = UnitHeads(config, rngs)


class Units(Stage):
    """Trains the speech tokenizer for recognition and reconstruction, with quantized digits."""

    parts = ("speech_tokenizer",)
    trained = ("speech_tokenizer",)
    private = ("heads",)
    settings = ("whisper",)
    example_type = SpokenText
    needs_tokenizer = False
    needs_recordings = True

    @functools.cached_property
    def dimensions(self) -> SpeechTokenizerConfig:
        """Of the tokenizer; they are not in config.json."""
        return speech_tokenizer.load_config(remote.as_path(self.train.checkpoint))

    def configure(self, config: Omni2Config) -> Omni2Config:
        """The same. Raises ValueError if units or lengths do not fit other parts or the buckets."""
        units = self.dimensions.units
        others = {"units (of the speech LM)": config.speech_lm and config.units}
        others["flow.units"] = config.flow and config.flow.units
        for name, expected in others.items():
            if expected and units != expected:
                raise ValueError(
                    f"{self.train.checkpoint}: the speech tokenizer has {self.dimensions.digits}"
                    f" digits, {units} units, but {name} is {expected}"
                )
        longest = max(bucket.tokens for bucket in self.train.buckets)
        if longest * STRIDE > self.dimensions.window:
            raise ValueError(
                f"a bucket has {longest} tokens, expected at most"
                f" {self.dimensions.window // STRIDE} units: the window of the speech tokenizer"
            )
        _ = self.whisper_weights  # its faults are found before anything is computed
        return config

    def build(self, config: Omni2Config, rngs: nnx.Rngs) -> nnx.Module:
        return TokenizerInTraining(self.dimensions, rngs)

    def initial(self, path: str) -> LazyArray | None:
        """With the setting `whisper`, a parameter of the Whisper encoder where the shapes agree."""
        return self.whisper_weights.get(path.removeprefix("speech_tokenizer."))

    @functools.cached_property
    def whisper_weights(self) -> dict[str, LazyArray]:
        if self.train.whisper is None:
            return {}
        return whisper_weights.matching(remote.as_path(self.train.whisper), self.dimensions)

    def outputs(self, model: TokenizerInTraining, batch: Batch) -> tuple[Array, Array, Array]:
        """Projected hidden states [B, T, K], logits [B, 2T, 256], and log-mel [B, 2T, M]."""
        tokenizer, lengths = model.speech_tokenizer, batch["length"][:, 0]
        speech = recordings.from_int16(batch["audio_16k"])
        mel = features.log_mel(speech, lengths * INPUT_SAMPLES, self.dimensions.mels)
        hidden = tokenizer.encode(mel.astype(self.compute_dtype), STRIDE * lengths)
        projected = tokenizer.project(hidden)
        digits = straight_through(projected).astype(self.compute_dtype)
        logits, log_mel = model.heads(digits, lengths)
        return projected, logits, log_mel

    def sums(self, batch: Batch, projected: Array, logits: Array, mel: Array) -> dict[str, Array]:
        """The loss and its parts, each summed over the units of a batch."""
        lengths, units = batch["length"][:, 0], jnp.sum(batch["length"])
        speech = recordings.from_int16(batch["audio_24k"])
        target = features.mel24k(speech, lengths * OUTPUT_SAMPLES, MELS)
        error = jnp.abs(mel.astype(jnp.float32) - target).mean(-1)
        frames = inside(FRAMES_PER_UNIT * lengths, error.shape[1])
        ctc = ctc_losses(logits, FRAMES_PER_UNIT * lengths, batch["labels"]).sum()
        mel_error = jnp.sum(error * frames) / FRAMES_PER_UNIT
        valid = inside(lengths, projected.shape[1])
        loss = ctc + MEL_WEIGHT * mel_error + SPREAD_WEIGHT * units * spread(projected, valid)
        return {"loss": loss, "terms": units, "ctc": ctc, "mel": mel_error}

    def loss(self, model: TokenizerInTraining, batch: Batch, key: Array) -> Loss:
        """The sum over units, and their number; nothing is drawn at random."""
        sums = self.sums(batch, *self.outputs(model, batch))
        return sums["loss"], sums["terms"]

    def measure(self, model: TokenizerInTraining, batch: Batch, key: Array) -> dict[str, Array]:
        """Also how often each unit occurs, and the edits between greedy symbols and labels."""
        projected, logits, mel = self.outputs(model, batch)
        lengths, labels = batch["length"][:, 0], batch["labels"]
        units = speech_tokenizer.units_of_digits(speech_tokenizer.bounded(projected))
        valid = inside(lengths, units.shape[1])
        symbols, counts = greedy(logits, FRAMES_PER_UNIT * lengths)
        label_counts = jnp.sum(labels != PAD, 1)
        sums = self.sums(batch, projected, logits, mel)
        return sums | {
            "occurrences": jnp.zeros(self.dimensions.units, jnp.int32).at[units].add(valid),
            "edits": edit_distance(symbols, counts, labels, label_counts).sum(),
            "labels": label_counts.sum(),
        }

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        terms = max(float(sums["terms"]), 1)
        share = sums["occurrences"] / terms
        used = share[share > 0]
        by_digit = share.reshape((LEVELS,) * self.dimensions.digits)
        axes = range(by_digit.ndim)
        rarest = [by_digit.sum(tuple(set(axes) - {axis})).min() for axis in axes]
        return super().report(sums) | {
            "character_error_rate": float(sums["edits"]) / max(float(sums["labels"]), 1),
            "mel_error": float(sums["mel"]) / terms,  # mean absolute, in nepers
            "ctc_loss": float(sums["ctc"]) / max(float(sums["labels"]), 1),  # nats a label
            "units_used": float(len(used)),
            "perplexity": float(np.exp(-np.sum(used * np.log(used)))),
            "rarest_digit": float(min(rarest)),  # the smallest share of a value of a digit
        }

    def flops(self, config, shapes, bucket) -> dict[str, tuple[float, float]]:
        return {}


def ctc_losses(logits: Array, lengths: Array, labels: Array) -> Array:
    """The CTC loss [B] of labels [B, L] (PAD is none) given logits [B, T, S] and lengths [B]."""
    beyond = 1.0 - inside(lengths, logits.shape[1])
    missing = labels == PAD
    losses = optax.ctc_loss(
        logits.astype(jnp.float32), beyond, jnp.where(missing, 0, labels), missing, blank_id=BLANK
    )
    return jnp.where(lengths > 0, losses, 0)


def spread(projected: Array, valid: Array) -> Array:
    """How far the digits [B, T, K] before tanh are from mean 0 and variance 1, over `valid` [B, T].

    (mean^2 + (variance - 1)^2), the mean over digits. At deviation 1 the three values of a digit
    are about equally frequent. Without it the digits saturate, and most of the units die.
    """
    x = projected.astype(jnp.float32)
    weight = valid[..., None] / jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(weight * x, (0, 1))
    variance = jnp.sum(weight * jnp.square(x - mean), (0, 1))
    return jnp.mean(jnp.square(mean) + jnp.square(variance - 1))

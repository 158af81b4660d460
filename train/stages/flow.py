"""Stage "flow": flow matching on recordings and their units, for a new voice or from nothing.

B batch, U units, T mel frames, M mel bins. Reference: CosyVoice2's
CausalMaskedDiffWithXvec.forward.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.audio import features, recordings
from omni2_jax.config import UNITS_PER_SECOND, Omni2Config
from omni2_jax.models import speaker
from omni2_jax.models.flow.mask import Chunks
from omni2_jax.models.model import Model
from omni2_jax.train.data.records import Turn
from omni2_jax.train.examples import (
    PAD,
    Item,
    ReplyExamples,
    Row,
    check_known,
    full,
    put,
)
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage

OUTPUT_SAMPLES = recordings.OUTPUT_RATE // UNITS_PER_SECOND  # 960 of a unit, at 24 kHz
INPUT_SAMPLES = recordings.INPUT_RATE // UNITS_PER_SECOND  # 640 of a unit, at 16 kHz


class RecordingExamples(ReplyExamples):
    """Single replies: units and recordings. A row's `tokens` are units."""

    def reply_size(self, turn: int, reply: Turn) -> int:
        if reply.clip is None or reply.units is None:
            raise ValueError(
                f"turn {turn} has no recording or no units, which the flow is trained on; "
                "omni2 prepare --speech-tokenizer makes units of recordings"
            )
        check_known(reply.units, self.config.flow.units)
        return len(reply.units)

    def empty(self, bucket: Bucket) -> Row:
        row = {
            "units": full(bucket.tokens, PAD),
            "audio_24k": np.zeros(bucket.tokens * OUTPUT_SAMPLES, np.int16),
        }
        if not self.train.one_voice:
            row["audio_16k"] = np.zeros(bucket.tokens * INPUT_SAMPLES, np.int16)
        return row

    def fill(self, row: Row, item: Item) -> None:
        """The recording and its units are cut to the shorter of the two, in whole units."""
        reply = self.reply(item)
        assert reply.units is not None and reply.clip is not None
        samples = self.data.clip(reply.clip)
        units = reply.units[: len(samples) // OUTPUT_SAMPLES]
        speech = samples[: len(units) * OUTPUT_SAMPLES]
        put(row, {"units": units, "audio_24k": recordings.to_int16(speech)})
        if not self.train.one_voice:
            narrow = recordings.resample(speech, recordings.OUTPUT_RATE, recordings.INPUT_RATE)
            put(row, {"audio_16k": recordings.to_int16(narrow)})


class FlowMatching(Stage):
    """Trains the flow by conditional flow matching, in float32 as its solver computes.

    Drawn at random for every row: the time, the noise, whether its conditions are kept (guidance),
    and how much of its beginning is given as a prompt. Drawn once for all rows: the chunk size,
    from the setting `chunks`.
    """

    trained = ("flow",)
    settings = ("chunks", "mu_steps", "one_voice")
    example_type = RecordingExamples
    needs_tokenizer = False
    needs_recordings = True
    reads_units = True

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        negative = [size for size in train.chunks if size < 0]
        return [f"chunks holds {size}, expected at least 0" for size in negative]

    @property
    def parts(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("flow",) if self.train.one_voice else ("flow", "speaker")

    def configure(self, config: Omni2Config) -> Omni2Config:
        """Raises ValueError unless the x-vector's size fits the setting `one_voice`."""
        size = config.flow.speaker
        if (size == 1) != self.train.one_voice:
            expected = "1" if self.train.one_voice else "that of a speaker encoder's x-vectors"
            raise ValueError(
                f"flow.speaker of the checkpoint is {size}, expected {expected} with the setting "
                f"one_voice={self.train.one_voice}"
            )
        return config

    def phase(self, number: int) -> str:
        return "mu" if number < self.train.mu_steps else ""

    def loss_in(self, phase: str):
        return self.mu_loss if phase == "mu" else self.loss

    def is_trained(self, path: str) -> bool:
        # The noise is a constant that is stored with the weights.
        return super().is_trained(path) and path != "flow.noise"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def mu_loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The error of the encoder's guess of the recordings' mel frames, in nepers."""
        lengths = jnp.sum(batch["units"] != PAD, 1)
        mel, _ = condition(model, batch)
        mu = self.mu(model, batch, lengths, self.draw_chunks(model, batch, key))
        return model.flow.compute_mu_loss(mel, model.flow.config.upsample * lengths, mu)

    def draw_chunks(self, model: Model, batch: Batch, key: Array) -> Chunks:
        """The chunk size of a step."""
        whole = batch["units"].shape[1]
        sizes = [size or whole for size in self.train.chunks] or [model.flow.config.chunk]
        return Chunks(jnp.array(sizes)[jax.random.randint(key, (), 0, len(sizes))])

    def mu(self, model: Model, batch: Batch, lengths: Array, chunks: Chunks) -> Array:
        """The encoder's guess of the mel of a batch, [B, T, M]."""
        return model.flow.mu(jnp.maximum(batch["units"], 0), lengths, chunks, self.train.remat)

    def loss(self, model: Model, batch: Batch, key: Array) -> Loss:
        """The flow matching loss of the recordings' mel frames."""
        flow, units = model.flow, batch["units"]
        config, rate, rows = flow.config, flow.config.upsample, units.shape[0]
        lengths = jnp.sum(units != PAD, 1)
        mel, x_vector = condition(model, batch)
        time_key, noise_key, keep_key, begin_key, share_key, chunk_key = jax.random.split(key, 6)
        prompt_frames = (
            jax.random.uniform(share_key, (rows,), maxval=0.3)
            * jax.random.bernoulli(begin_key, 0.5, (rows,))
            * rate
            * lengths
        )
        frame = jnp.arange(mel.shape[1])
        prompt = jnp.where(frame[None, :, None] < prompt_frames[:, None, None], mel, 0)
        chunks = self.draw_chunks(model, batch, chunk_key)
        mu = self.mu(model, batch, lengths, chunks)
        return flow.compute_loss(
            mel,
            rate * lengths,
            mu,
            flow.voice(x_vector),
            prompt,
            jax.random.uniform(time_key, (rows,)),
            jax.random.normal(noise_key, mel.shape),
            jax.random.bernoulli(keep_key, 1 - config.guidance_dropout, (rows,)),
            chunks,
            self.train.remat,
        )

    def frozen_work(self):
        return {"features, speaker encoder": condition}


def condition(model: Model, batch: Batch) -> tuple[Array, Array]:
    """The normalized log-mel [B, T, M] of recordings, and the x-vectors [B, E] of their speaker."""
    lengths = jnp.sum(batch["units"] != PAD, 1)
    speech = recordings.from_int16(batch["audio_24k"])
    mel = features.mel24k(speech, lengths * OUTPUT_SAMPLES, model.flow.config.mels)
    mel = model.flow.normalized(mel)
    if "audio_16k" not in batch:
        return mel, jnp.ones((len(mel), 1))
    narrow = recordings.from_int16(batch["audio_16k"])
    # A row of padding counts as two units of silence: its x-vector has to be finite.
    x_vector = speaker.embed(model.speaker, narrow, jnp.maximum(lengths, 2) * INPUT_SAMPLES)
    return mel, jax.lax.stop_gradient(x_vector)

"""Stage "vocoder": HiFT on recordings, by their spectra and phases, then against discriminators.

A step vocodes a random piece of each recording from the mel of the recording itself. Its phases and
losses are the settings `VocoderTraining`; what a step does is in vocoder_objective.py.
B batch, N samples and T mel frames of a row, S frames of a piece, M mel bins.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.audio import features, recordings
from omni2_jax.audio.features import SPEECH_HOP
from omni2_jax.config import FRAMES_PER_UNIT, Omni2Config
from omni2_jax.models.layers import inside
from omni2_jax.models.vocoder import build as build_vocoder
from omni2_jax.models.vocoder.hift import Hift, draw
from omni2_jax.train import f0_targets, spectral
from omni2_jax.train.data.records import Turn
from omni2_jax.train.discriminators import Discriminators
from omni2_jax.train.examples import Item, ReplyExamples, Row, put
from omni2_jax.train.settings import Bucket, TrainConfig
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage
from omni2_jax.train.weights import Weights

# Frames around a piece, so that its mel is that of the whole recording.
MARGIN = features.SPEECH_FFT // SPEECH_HOP


class PieceExamples(ReplyExamples):
    """Single recordings of replies, of which the stage takes pieces. A row's `tokens` are 40 ms."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.f0 = f0_targets.of_dataset(self.data)

    def reply_size(self, turn: int, reply: Turn) -> int:
        segment = self.train.vocoder.segment
        if reply.clip is None:
            raise ValueError(f"turn {turn} has no recording, which the vocoder is trained on")
        if (frames := reply.samples // SPEECH_HOP) < segment:
            raise ValueError(
                f"its recording is shorter than the setting vocoder.segment ({frames} of "
                f"{segment} mel frames)"
            )
        if not self.f0.clip(reply.clip).any():
            raise ValueError(f"turn {turn} has no voice in its recording")
        return -(-frames // FRAMES_PER_UNIT)

    def empty(self, bucket: Bucket) -> Row:
        frames = FRAMES_PER_UNIT * bucket.tokens
        return {
            "audio": np.zeros((frames + 2 * MARGIN) * SPEECH_HOP, np.int16),
            "f0": np.zeros(frames, np.float32),
            "frames": np.zeros((), np.int32),
        }

    def fill(self, row: Row, item: Item) -> None:
        """The whole frames of the recording, behind a margin of zeros."""
        reply = self.reply(item)
        assert reply.clip is not None
        f0 = self.f0.clip(reply.clip)
        samples = self.data.clip(reply.clip)[: len(f0) * SPEECH_HOP]
        margin = np.zeros(MARGIN * SPEECH_HOP, np.float32)
        audio = recordings.to_int16(np.concatenate([margin, samples]))
        put(row, {"audio": audio, "f0": f0})
        row["frames"][...] = len(f0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """What a step vocodes."""

    samples: Array  # [B, S * 480] in [-1, 1]
    mel: Array  # [B, S, M]
    f0: Array  # [B, S] in Hz, 0 = unvoiced
    rows: Array  # [B] bool: False for a row of padding, which has no loss


class VocoderModel(nnx.Module):
    """The vocoder and, where the settings have them, its discriminators."""

    def __init__(self, config: Omni2Config, train: TrainConfig, rngs: nnx.Rngs):
        assert config.vocoder is not None
        settings = train.vocoder
        vocoder = build_vocoder(config.vocoder, rngs)
        assert isinstance(vocoder, Hift), "the stage trains HiFT's harmonic source"
        self.vocoder = vocoder
        if settings.gan_from is not None:
            self.discriminators = Discriminators(
                rngs, settings.width, settings.periods, settings.resolutions
            )


class VocoderStage(Stage):
    """Trains HiFT, from nothing or from released weights, in float32 as it is run."""

    parts = ("vocoder",)
    trained = ("vocoder",)
    settings = ("vocoder",)
    example_type = PieceExamples
    needs_tokenizer = False
    needs_recordings = True

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        faults, settings = [], train.vocoder
        if train.microbatches > 1:
            faults += [f"microbatches is {train.microbatches}, expected 1 for stage vocoder"]
        judged = () if settings.gan_from is None else settings.resolutions
        longest = max(*spectral.RESOLUTIONS, features.SPEECH_FFT, *judged)
        if settings.segment * SPEECH_HOP < longest:
            faults += [
                f"vocoder.segment is {settings.segment}, expected at least "
                f"{-(-longest // SPEECH_HOP)}: the longest spectrum is of {longest} samples"
            ]
        return faults

    @property
    def private(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return () if self.train.vocoder.gan_from is None else ("discriminators",)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def build(self, config: Omni2Config, rngs: nnx.Rngs) -> VocoderModel:
        return VocoderModel(config, self.train, rngs)

    def phase(self, number: int) -> str:
        settings = self.train.vocoder
        if number < settings.f0_steps:
            return "f0"
        is_adversarial = settings.gan_from is not None and number >= settings.gan_from
        return "adversarial" if is_adversarial else "spectral"

    def objective(self, weights: Weights, steps: int):
        from omni2_jax.train.vocoder_objective import VocoderObjective

        return VocoderObjective(self, weights, steps)

    def pieces(self, mels: int, batch: Batch, key: Array) -> Pieces:
        """A random piece of each row of a batch."""
        size = self.train.vocoder.segment
        room = jnp.maximum(batch["frames"] - size, 0) + 1
        starts = jax.random.randint(key, room.shape, 0, room)

        def cut(row: Array, start: Array, length: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(row, start, length)

        wide = jax.vmap(lambda row, start: cut(row, start, (size + 2 * MARGIN) * SPEECH_HOP))(
            batch["audio"], starts * SPEECH_HOP
        )
        wide = recordings.from_int16(wide)
        margin = MARGIN * SPEECH_HOP
        return Pieces(
            samples=wide[:, margin:-margin],
            mel=features.mel24k(wide, mels=mels)[:, MARGIN:-MARGIN],
            f0=jax.vmap(lambda row, start: cut(row, start, size))(batch["f0"], starts),
            rows=batch["frames"] > 0,
        )

    def generate(self, vocoder: Hift, pieces: Pieces, key: Array) -> tuple[Array, Array]:
        """The vocoder's samples [B, S * 480] of some pieces, and its F0 [B, S].

        The samples pass no gradient to F0: its harmonics turn too fast for one.
        """
        frames = jnp.full(len(pieces.mel), pieces.mel.shape[1])
        keys = jax.random.split(key, len(pieces.mel))
        phase, noise = draw(vocoder.config, keys, pieces.samples.shape[1])
        f0 = vocoder.f0(pieces.mel, frames)
        source = vocoder.source(jax.lax.stop_gradient(f0), phase, noise)
        return vocoder.decode(pieces.mel, frames, source), f0

    def loss(self, model: VocoderModel, batch: Batch, key: Array) -> Loss:
        """The difference of the log-mels of whole recordings and of what is vocoded from them.

        In nepers: the sum over frames and bins, and their number. It is what is validated.
        """
        vocoder, frames = model.vocoder, batch["frames"]
        margin = MARGIN * SPEECH_HOP
        audio = recordings.from_int16(batch["audio"])[:, margin:-margin]
        mels = vocoder.config.mels
        mel = features.mel24k(audio, frames * SPEECH_HOP, mels)
        keys = jax.random.split(key, len(mel))
        samples = vocoder(mel, frames, *draw(vocoder.config, keys, audio.shape[1]))
        again = features.mel24k(samples, frames * SPEECH_HOP, mels)
        valid = inside(frames, mel.shape[1])
        return jnp.abs(mel - again).sum(where=valid[..., None]), valid.sum() * mels

"""Flow matching: units to mel, by integrating the estimator's velocity from noise. CosyVoice2's CausalMaskedDiffWithXvec.

B rows, n units, T = 2n mel frames (50 a second), M mel bins, D width.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.context import Chunks, Memory, Window
from omni2_jax.models.flow.encoder import Encoder, EncoderPast
from omni2_jax.models.flow.estimator import Estimator, Tails
from omni2_jax.models.layers import Embedding, Linear, param

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Speech to go on from, right-padded."""

    units: Array  # [B, p] int32
    mel: Array  # [B, 2p, M]
    lengths: Array  # [B] units


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowPast:
    """What is kept of finished chunks. The estimator's rows are those of the guided branch, then those of the free one."""

    encoder: EncoderPast
    tails: Tails  # with a leading axis of Euler steps
    memory: Memory  # its layers are the estimator's blocks, step after step


def cosine(t):
    """The schedule of training and sampling: uniform t in [0, 1] -> time, slow at the noisy end."""
    return 1 - jnp.cos(t * (0.5 * np.pi))


def joined(prompt: Prompt, units: Array) -> Array:
    """Prompt and units [B, p + n], the padding of both at the end."""
    index = jnp.arange(prompt.units.shape[1] + units.shape[1]) - prompt.lengths[:, None]
    ours = jnp.take_along_axis(units, jnp.clip(index, 0, units.shape[1] - 1), 1)
    return jnp.where(index < 0, jnp.pad(prompt.units, ((0, 0), (0, units.shape[1]))), ours)


class Flow(nnx.Module):
    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(rngs, config.units, config.width)
        self.speaker = Linear(rngs, (config.speaker, config.mels), (None, None))
        self.encoder = Encoder(config, rngs)
        self.project = Linear(rngs, (config.width, config.mels), ("embed", None))
        self.estimator = Estimator(config, rngs)
        # The noise that sampling starts from, always the same: what a frame becomes must not depend on how it was cut into chunks.
        self.noise = param(rngs, (config.noise_frames, config.mels), (None, None), fan_in=1)

    def voice(self, xvector: Array) -> Array:
        """CAM++ x-vector [B, 192] -> speaker condition [B, M]."""
        return self.speaker(
            xvector / jnp.maximum(jnp.linalg.norm(xvector, axis=-1, keepdims=True), 1e-12)
        )

    def mu(self, units: Array, lengths: Array, chunks: Chunks) -> Array:
        """Units [B, n] -> the encoder's guess of the mel [B, 2n, M]."""
        n, rate = units.shape[1], self.config.upsample
        seen = (
            Window.whole(n, lengths, chunks, 1),
            Window.whole(rate * n, rate * lengths, chunks, rate),
        )
        return self.project(self.encoder(self.embed(units), *seen)[0])

    def past(self, batch: int, capacity: int, dtype) -> FlowPast:
        """Room for `capacity` units of `batch` streams."""
        c, stages = self.config, self.estimator.layers
        tails = self.estimator.tails(2 * batch, dtype)
        return FlowPast(
            self.encoder.past(batch, capacity, dtype),
            jax.tree.map(lambda tail: jnp.zeros((c.steps, *tail.shape), dtype), tails),
            Memory.empty(
                c.steps * math.prod(stages),
                2 * batch,
                c.upsample * capacity,
                c.estimator_heads,
                c.estimator_head_size,
                dtype,
            ),
        )

    def solve(
        self,
        mu: Array,
        voice: Array,
        cond: Array,
        z: Array,
        window: Window,
        tails: Tails | None = None,
        memory: Memory | None = None,
    ) -> tuple[Array, Tails, Memory | None]:
        """Euler steps from noise z to mel [B, T, M], with classifier-free guidance; both branches are one batch.

        Where there is a past, `tails` have a leading axis of steps, and the memory's layers are those of all steps.
        """
        config = self.config
        given = jnp.concatenate([mu, jnp.broadcast_to(voice[:, None], mu.shape), cond], -1)
        given = jnp.concatenate([given, jnp.zeros_like(given)])
        both = jax.tree.map(lambda a: jnp.concatenate([a, a]), window)
        times = cosine(jnp.linspace(0.0, 1.0, config.steps + 1))
        firsts = jnp.arange(config.steps) * math.prod(self.estimator.layers)

        def step(carry, xs):
            (x, memory), (t, dt, first, tails) = carry, xs
            velocity, tails, memory = self.estimator(
                jnp.concatenate([x, x]), given, t[None], both, tails, memory, first
            )
            guided, free = jnp.split(velocity, 2)
            return (
                x + dt * ((1 + config.guidance) * guided - config.guidance * free),
                memory,
            ), tails

        (mel, memory), tails = jax.lax.scan(
            step, (z, memory), (times[:-1], jnp.diff(times), firsts, tails)
        )
        return mel, tails, memory

    def __call__(
        self,
        units: Array,
        lengths: Array,
        voice: Array,
        final: Array | bool = True,
        prompt: Prompt | None = None,
        chunks: Chunks | None = None,
    ) -> tuple[Array, Array]:
        """Right-padded units [B, n] of `lengths` [B], and a voice [B, M] -> mel [B, 2n, M] (zeros past the end) and its lengths [B].

        final [B] or scalar: without it more units are to come, and the frames that lack their look-ahead are left out.
        chunks: what a unit sees; by default the config's chunk and everything before it.
        Raises ValueError where prompt and units are longer than the noise. Reference: CausalMaskedDiffWithXvec.inference.
        """
        config, rate, before = self.config, self.config.upsample, jnp.zeros_like(lengths)
        chunks, n = chunks or Chunks(config.chunk), units.shape[1]
        if prompt is not None:
            units, before = joined(prompt, units), prompt.lengths
        frames = rate * units.shape[1]
        if frames > config.noise_frames:
            raise ValueError(
                f"{units.shape[1]} units make {frames} mel frames; the flow's noise has {config.noise_frames}"
            )
        mu = self.mu(units, before + lengths, chunks)
        available = before + lengths - jnp.where(final, 0, config.lookahead)
        window = Window.whole(frames, rate * available, chunks, rate)
        cond = jnp.zeros_like(mu)
        if prompt is not None:
            cond = (
                cond.at[:, : prompt.mel.shape[1]].set(prompt.mel)
                * (window.query < rate * before[:, None])[..., None]
            )
        z = jnp.broadcast_to(self.noise[:frames].astype(mu.dtype), mu.shape)
        mel = self.solve(mu, voice, cond, z, window)[0] * window.valid[..., None]
        mel = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, rate * n))(
            mel, rate * before
        )
        return mel, rate * jnp.maximum(available - before, 0)

    def compute_loss(
        self,
        mel: Array,
        lengths: Array,
        mu: Array,
        voice: Array,
        cond: Array,
        t: Array,
        z: Array,
        kept: Array,
        chunks: Chunks | None = None,
    ) -> tuple[Array, Array]:
        """Conditional flow matching loss of mel [B, T, M] of `lengths` [B] frames given mu, cond [B, T, M] and voice [B, M]: the sum of
        squared errors, and of how many numbers.

        Random draws: t [B] uniform in [0, 1], z [B, T, M] normal, kept [B] bool: a row without its conditions trains the
        free branch of the guidance (chance `guidance_dropout`). chunks: as for the call. Reference: ConditionalCFM.compute_loss.
        """
        t, still = cosine(t), 1 - self.config.sigma_min
        window = Window.whole(
            mel.shape[1], lengths, chunks or Chunks(self.config.chunk), self.config.upsample
        )
        x = (1 - still * t[:, None, None]) * z + t[:, None, None] * mel
        given = (
            jnp.concatenate([mu, jnp.broadcast_to(voice[:, None], mu.shape), cond], -1)
            * kept[:, None, None]
        )
        error = (self.estimator(x, given, t, window)[0] - (mel - still * z)) * window.valid[
            ..., None
        ]
        return jnp.square(error).sum(), window.valid.sum() * mel.shape[-1]

"""Flow matching: units to mel, by integrating the estimator's velocity from noise.

Port of CosyVoice2's CausalMaskedDiffWithXvec. Here are the passes over whole utterances and the
training loss; streaming.py computes the same mel chunk by chunk. In this repository only tests call
a flow with a `prompt` or units that are not `final`: to compare it with the released code, and
streaming.py with it.
B rows, n units, T = 2n mel frames (50 a second), M mel bins, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import FlowConfig
from omni2_jax.models.flow.cache import NO_CACHE, Maybe
from omni2_jax.models.flow.encoder import Encoder, EncoderCache
from omni2_jax.models.flow.estimator import Estimator, EstimatorCache
from omni2_jax.models.flow.mask import Chunks, Window
from omni2_jax.models.layers import Embedding, Linear, inside, param

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Speech that the generated mel continues, right-padded (CosyVoice2's zero-shot prompt)."""

    units: Array  # [B, p] int32
    mel: Array  # [B, 2p, M]
    lengths: Array  # [B] units

    def followed_by(self, units: Array) -> Array:
        """The prompt's units, then `units` [B, n] -> [B, p + n], all padding at the end.

        In:  prompt 1 2 - -   units 7 8 9 -
        Out: 1 2 7 8 9 - - -
        """
        index = jnp.arange(self.units.shape[1] + units.shape[1]) - self.lengths[:, None]
        moved = jnp.take_along_axis(units, jnp.clip(index, 0, units.shape[1] - 1), 1)
        return jnp.where(index < 0, jnp.pad(self.units, ((0, 0), (0, units.shape[1]))), moved)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowCache:
    """What the flow keeps of finished chunks."""

    encoder: EncoderCache
    estimator: EstimatorCache


def cosine(t):
    """The time schedule: uniform t in [0, 1] -> time in [0, 1], with small steps near the noise."""
    return 1 - jnp.cos(t * (0.5 * np.pi))


class Flow(nnx.Module):
    """Units and a voice to mel frames.

    The encoder turns units into a first guess of the mel, `mu`. The estimator gives the velocity
    dx/dt of a noisy mel x under the conditions mu and voice; `solve` integrates it from noise.
    Calling the flow gives the mel of whole utterances (`flow_step` in streaming.py: of parts).
    """

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(rngs, config.units, config.width)
        self.speaker = Linear(rngs, (config.speaker, config.mels), (None, None))
        self.encoder = Encoder(config, rngs)
        self.project = Linear(rngs, (config.width, config.mels), ("embed", None))
        self.estimator = Estimator(config, rngs)
        # Sampling always starts from the same noise, so that a frame's mel does not depend on the
        # chunk in which it was computed.
        self.noise = param(rngs, (config.noise_frames, config.mels), (None, None), fan_in=1)

    def voice(self, xvector: Array) -> Array:
        """CAM++ x-vector [B, 192] -> speaker condition [B, M]."""
        norm = jnp.maximum(jnp.linalg.norm(xvector, axis=-1, keepdims=True), 1e-12)
        return self.speaker(xvector / norm)

    def normalized(self, mel: Array) -> Array:
        """Log-mel [..., M] (natural logarithm) -> what the flow works on, [..., M].

        That has mean 0 and deviation 1 if the config states the mean and deviation of log-mels.
        """
        config = self.config
        if (config.mel_mean, config.mel_std) == (0, 1):
            return mel
        return (mel - config.mel_mean) / config.mel_std

    def restored(self, mel: Array) -> Array:
        """The inverse of `normalized`, [..., M] -> log-mel [..., M]."""
        config = self.config
        if (config.mel_mean, config.mel_std) == (0, 1):
            return mel
        return mel * config.mel_std + config.mel_mean

    def mu(self, units: Array, lengths: Array, chunks: Chunks, remat: str = "full") -> Array:
        """Right-padded units [B, n] of `lengths` [B] -> the encoder's guess of mel [B, T, M].

        The mel is a normalized one. remat: see `run_blocks`.
        """
        n, rate = units.shape[1], self.config.upsample
        unit_window = Window.whole(n, lengths, chunks, 1)
        frame_window = Window.whole(rate * n, rate * lengths, chunks, rate)
        features, _ = self.encoder(self.embed(units), unit_window, frame_window, NO_CACHE, remat)
        return self.project(features)

    def empty_cache(self, batch: int, capacity: int, dtype) -> FlowCache:
        """A cache of `capacity` units for each of `batch` streams; each branch has a row of it."""
        frames = self.config.upsample * capacity
        return FlowCache(
            encoder=self.encoder.empty_cache(batch, capacity, dtype),
            estimator=self.estimator.empty_cache(2 * batch, frames, dtype),
        )

    def solve(
        self,
        mu: Array,
        voice: Array,
        cond: Array,
        z: Array,
        window: Window,
        cache: Maybe[EstimatorCache],
    ) -> tuple[Array, Maybe[EstimatorCache]]:
        """Integrate from noise z [B, T, M] to a normalized mel -> (mel [B, T, M], cache).

        Euler's method with classifier-free guidance under the conditions mu [B, T, M], voice
        [B, M] and cond [B, T, M], the prompt's mel. Reference: ConditionalCFM.solve_euler.
        """
        config = self.config
        conditions = jnp.concatenate([mu, jnp.broadcast_to(voice[:, None], mu.shape), cond], -1)
        # Both branches are one batch: guided rows, then free ones, whose conditions are zero.
        conditions = jnp.concatenate([conditions, jnp.zeros_like(conditions)])
        both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), window)
        times = cosine(jnp.linspace(0.0, 1.0, config.steps + 1))

        @jax.named_scope("euler_step")
        def step(carry, xs):
            (x, kv), (t, dt, number, convs, shifts) = carry, xs
            kv = kv and kv.of_pass(number, self.estimator.layers)
            step_cache = kv and EstimatorCache(convs, kv)
            twice = jnp.concatenate([x, x])
            shifts = None if shifts is None else shifts[:, None]
            velocity, step_cache = self.estimator(
                twice, conditions, t[None], both, step_cache, shifts=shifts
            )
            guided, free = jnp.split(velocity, 2)
            x = x + dt * ((1 + config.guidance) * guided - config.guidance * free)
            kv = step_cache and step_cache.kv.between_steps()
            return (x, kv), step_cache and step_cache.convs

        convs, kv = (NO_CACHE, NO_CACHE) if cache is None else (cache.convs, cache.kv)
        shifts = self.estimator.shifts(times[:-1])
        steps = times[:-1], jnp.diff(times), jnp.arange(config.steps), convs, shifts
        (mel, kv), convs = jax.lax.scan(step, (z, kv), steps)
        return mel, cache and EstimatorCache(convs, kv)

    def __call__(
        self,
        units: Array,
        lengths: Array,
        voice: Array,
        final: Array | bool = True,
        prompt: Prompt | None = None,
        chunks: Chunks | None = None,
    ) -> tuple[Array, Array]:
        """The mel of whole utterances, in one pass -> (mel [B, T, M], zero-padded; frames [B]).

        units [B, n]: right-padded, of `lengths` [B]; voice [B, M]; final [B] or scalar: whether the
        units are complete. If not, the last `lookahead` units, whose look-ahead is missing, give no
        frames. prompt: speech to continue. chunks: which units a unit attends to, by default the
        config's chunk and all chunks before it.
        Raises ValueError if prompt and units together are longer than the noise.
        Reference: CausalMaskedDiffWithXvec.inference.
        """
        config, rate, before = self.config, self.config.upsample, jnp.zeros_like(lengths)
        chunks, n = chunks or Chunks(config.chunk), units.shape[1]
        if prompt is not None:
            units, before = prompt.followed_by(units), prompt.lengths
        frames = rate * units.shape[1]
        if frames > config.noise_frames:
            raise ValueError(
                f"{units.shape[1]} units make {frames} mel frames; "
                f"the flow's noise has {config.noise_frames}"
            )
        mu = self.mu(units, before + lengths, chunks)
        available = before + lengths - jnp.where(final, 0, config.lookahead)
        window = Window.whole(frames, rate * available, chunks, rate)
        cond = jnp.zeros_like(mu)
        if prompt is not None:
            cond = cond.at[:, : prompt.mel.shape[1]].set(self.normalized(prompt.mel))
            cond = cond * (window.query < rate * before[:, None])[..., None]
        z = jnp.broadcast_to(self.noise[:frames].astype(mu.dtype), mu.shape)
        mel, _ = self.solve(mu, voice, cond, z, window, NO_CACHE)
        mel = self.restored(mel)

        def without_prompt(row: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(row, start, rate * n)

        mel = jax.vmap(without_prompt)(mel * window.valid[..., None], rate * before)
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
        conditioned: Array,
        chunks: Chunks | None = None,
        remat: str = "full",
    ) -> tuple[Array, Array]:
        """Conditional flow matching loss -> (sum of squared errors, number of terms).

        mel [B, T, M]: targets, normalized, of `lengths` [B] frames; mu, cond [B, T, M] and voice
        [B, M]: their conditions. Random draws: t [B] uniform in [0, 1]; z [B, T, M] normal;
        conditioned [B] bool: a row without its conditions trains the free branch of the guidance
        (its probability is `guidance_dropout`). chunks: as in `__call__`; remat: see `run_blocks`.
        Reference: ConditionalCFM.compute_loss.
        """
        t, noise_share = cosine(t), 1 - self.config.sigma_min
        chunks = chunks or Chunks(self.config.chunk)
        window = Window.whole(mel.shape[1], lengths, chunks, self.config.upsample)
        x = (1 - noise_share * t[:, None, None]) * z + t[:, None, None] * mel
        conditions = jnp.concatenate([mu, jnp.broadcast_to(voice[:, None], mu.shape), cond], -1)
        conditions = conditions * conditioned[:, None, None]
        velocity, _ = self.estimator(x, conditions, t, window, NO_CACHE, remat)
        error = (velocity - (mel - noise_share * z)) * window.valid[..., None]
        return jnp.square(error).sum(), window.valid.sum() * mel.shape[-1]

    def compute_mu_loss(self, mel: Array, lengths: Array, mu: Array) -> tuple[Array, Array]:
        """The encoder's error alone -> (sum of absolute errors in nepers, number of terms).

        mel [B, T, M]: targets, normalized, of `lengths` [B] frames; mu [B, T, M].
        """
        valid = inside(lengths, mel.shape[1])
        error = self.config.mel_std * jnp.abs(mel - mu)
        return error.sum(where=valid[..., None]), valid.sum() * mel.shape[-1]

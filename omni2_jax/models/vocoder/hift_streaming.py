"""Streaming vocoder: every step turns the mel frames that have arrived into samples, all slots of a batch at once.

B slots, F mel frames of a step at most, M mel bins, H harmonics. A step vocodes the last `overlap` frames again in front of the new
ones, keeps their old excitation, and cross-fades their samples, which were held back for it (the released SpeechDecoder.token2wav).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.config import HiftConfig
from omni2_jax.models.layers import Array
from omni2_jax.models.vocoder.hift import Hift, trim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocoderState:
    """What a stream's next step needs. A slot that has not been vocoded yet may hold fewer than `overlap` frames."""

    mel: Array  # [B, overlap, M] the latest frames, left-aligned
    held: Array  # [B] how many of them there are
    vocoded: Array  # [B] bool: the rest belongs to these frames
    source: Array  # [B, overlap * samples_per_frame] their excitation
    samples: Array  # [B, overlap * samples_per_frame] their samples, not given out yet
    phase: Array  # [B, H] of each harmonic at their end, in radians

    @classmethod
    def empty(cls, config: HiftConfig, batch: int) -> "VocoderState":
        hold = config.overlap * config.samples_per_frame
        return cls(
            mel=jnp.zeros((batch, config.overlap, config.mels)),
            held=jnp.zeros(batch, jnp.int32),
            vocoded=jnp.zeros(batch, bool),
            source=jnp.zeros((batch, hold)),
            samples=jnp.zeros((batch, hold)),
            phase=jnp.zeros((batch, config.harmonics + 1)),
        )

    def restart(self, streams: Array) -> "VocoderState":
        """New streams where `streams` [B] is True. What they held is forgotten; the rest is only read behind `vocoded`."""
        return dataclasses.replace(
            self, held=jnp.where(streams, 0, self.held), vocoded=self.vocoded & ~streams
        )


def vocoder_step(
    hift: Hift,
    state: VocoderState,
    mel: Array,
    frames: Array,
    final: Array,
    phase: Array,
    noise: Array,
    seamless: bool = False,
) -> tuple[VocoderState, Array, Array]:
    """Vocode a step's new frames -> (state, samples [B, T], sample counts [B]), T = (overlap + F) * samples_per_frame.

    mel [B, F, M]: each slot's new frames, left-aligned; frames [B]: how many, 0 to F; final [B] bool: no more will come, so nothing is
    held back and the slot is empty again; phase [B, H] and noise [B, T, H]: the source's draws (`hift.draw`). A slot without new
    frames that is not final is left as it is; one with fewer than `overlap` frames in all waits for more.

    The released code starts the harmonics anew in each step, so their phases jump behind the old excitation, and its two fades add up
    to 1.08. `seamless` carries the phases on (a slot's first draw stays) and fades to a sum of 1.
    """
    overlap, rate = hift.config.overlap, hift.config.samples_per_frame
    window, total = append(state.mel, state.held, mel, frames)
    runs = ((frames > 0) & (total >= overlap)) | final
    size, hold = total * rate, overlap * rate

    f0 = hift.f0(window, total)
    turns = (
        2 * jnp.pi * hift.cycles(f0)[..., None] * jnp.arange(1, phase.shape[1] + 1)
    )  # [B, overlap + F, H] by each frame's end
    rise, fall = np.split(np.hamming(2 * hold).astype(np.float32), 2)
    if seamless:
        phase = jnp.where(state.vocoded[:, None], state.phase - turns[:, overlap - 1], phase)
        fall = 1 - rise
    source = replace_head(hift.source(f0, phase, noise), state.source, state.vocoded)
    samples = hift.decode(window, total, source)
    samples = replace_head(samples, samples[:, :hold] * rise + state.samples * fall, state.vocoded)
    counts = jnp.where(runs, jnp.where(final, size, size - hold), 0)

    keep = lambda new, old: jnp.where(runs[:, None], new, old)  # noqa: E731
    after = VocoderState(
        mel=last(window, total, overlap),
        held=jnp.where(final, 0, jnp.minimum(total, overlap)),
        vocoded=(state.vocoded | runs) & ~final,
        source=keep(last(source, size, hold), state.source),
        samples=keep(last(samples, size, hold), state.samples),
        phase=keep((phase + last(turns, total, 1)[:, 0]) % (2 * jnp.pi), state.phase),
    )
    return after, trim(samples, counts), counts


def append(old: Array, held: Array, new: Array, count: Array) -> tuple[Array, Array]:
    """`held` [B] rows of old [B, S, ...] and `count` [B] of new [B, F, ...] behind them -> [B, S + F, ...], zeros after, and the sum."""
    room = jnp.pad(old, ((0, 0), (0, new.shape[1]), (0, 0)))
    joined = jax.vmap(
        lambda room, new, start: jax.lax.dynamic_update_slice_in_dim(room, new, start, 0)
    )(room, new, held)
    return trim(joined, held + count), held + count


def last(x: Array, lengths: Array, size: int) -> Array:
    """The last `size` of each row's `lengths` [B] steps of x [B, T, ...]; the first `size` of a shorter row."""
    return jax.vmap(
        lambda row, end: jax.lax.dynamic_slice_in_dim(row, jnp.maximum(end - size, 0), size)
    )(x, lengths)


def replace_head(x: Array, head: Array, where: Array) -> Array:
    """x [B, T] with its first samples replaced by head [B, S] in the rows `where` [B]."""
    return jnp.concatenate(
        [jnp.where(where[:, None], head, x[:, : head.shape[1]]), x[:, head.shape[1] :]], axis=1
    )

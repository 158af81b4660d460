"""HiFT step by step: each step turns the mel frames that have arrived into samples, for all slots.

A step vocodes the last `overlap` frames again in front of the new ones, with their old excitation,
and cross-fades the two versions of their samples. So the samples of a step's last `overlap` frames
are held back until the next step (reference: the released SpeechDecoder.token2wav).
B slots, F mel frames of a step at most, M mel bins, H harmonics.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.config import HiftConfig
from omni2_jax.models.vocoder.hift import Array, Hift, draw, trim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiftState:
    """What the next step needs of the frames so far.

    A slot holds the latest `overlap` frames, or all of them while they are fewer. Before a slot has
    been vocoded for the first time, only `mel` and `num_held` are in use.
    """

    mel: Array  # [B, overlap, M] the frames, left-aligned
    num_held: Array  # [B] how many they are
    vocoded: Array  # [B] bool: source, samples and phase belong to the frames in `mel`
    source: Array  # [B, overlap * samples_per_frame] their excitation
    samples: Array  # [B, overlap * samples_per_frame] their samples, not returned yet
    phase: Array  # [B, H] phase of each harmonic at their end, in radians

    @classmethod
    def empty(cls, config: HiftConfig, batch: int) -> "HiftState":
        """`batch` slots without frames."""
        hold = config.overlap * config.samples_per_frame
        return cls(
            mel=jnp.zeros((batch, config.overlap, config.mels)),
            num_held=jnp.zeros(batch, jnp.int32),
            vocoded=jnp.zeros(batch, bool),
            source=jnp.zeros((batch, hold)),
            samples=jnp.zeros((batch, hold)),
            phase=jnp.zeros((batch, config.harmonics + 1)),
        )

    def restart(self, slots: Array) -> "HiftState":
        """Forget the frames of the slots where `slots` [B] is True."""
        num_held = jnp.where(slots, 0, self.num_held)
        return dataclasses.replace(self, num_held=num_held, vocoded=self.vocoded & ~slots)


class StreamingHift(Hift):
    """HiFT as a streaming vocoder (see base.py): the network with a state and its own draws."""

    def empty_state(self, batch: int) -> HiftState:
        return HiftState.empty(self.config, batch)

    def restart(self, state: HiftState, slots: Array) -> HiftState:
        return state.restart(slots)

    def step(
        self, state: HiftState, mel: Array, frames: Array, final: Array, keys: Array, seamless: bool
    ) -> tuple[HiftState, Array, Array]:
        size = (self.config.overlap + mel.shape[1]) * self.config.samples_per_frame
        phase, noise = draw(self.config, keys, size)

        def all_slots(state, mel, frames, final, phase, noise):
            return hift_step(self, state, mel, frames, final, phase, noise, seamless)

        def one_slot(inputs):
            outputs = all_slots(*jax.tree.map(lambda leaf: leaf[None], inputs))
            return jax.tree.map(lambda leaf: leaf[0], outputs)

        def slot_by_slot(*inputs):
            return jax.lax.map(one_slot, inputs)

        # On a CPU one slot at a time: XLA's convolutions of a batch round the last frames of the
        # last slot differently (flow/conv.py). With four slots at real dimensions the vocoder then
        # takes 12 % more time.
        inputs = (state, mel, frames, final, phase, noise)
        if len(mel) == 1:
            return all_slots(*inputs)
        return jax.lax.platform_dependent(*inputs, cpu=slot_by_slot, default=all_slots)


def hift_step(
    hift: Hift,
    state: HiftState,
    mel: Array,
    frames: Array,
    final: Array,
    phase: Array,
    noise: Array,
    seamless: bool = False,
) -> tuple[HiftState, Array, Array]:
    """Vocode a step's new frames -> (state, samples [B, T], sample counts [B]).

    T = (overlap + F) * samples_per_frame. mel [B, F, M]: the new frames of each slot, left-aligned;
    frames [B]: how many, 0 to F; final [B] bool: no more will come, so nothing is held back and the
    slot is empty again; phase [B, H] and noise [B, T, H]: the source's draws (`hift.draw`). A slot
    without new frames that is not final does not change; one with fewer than `overlap` frames in
    all waits for more.

    The released code starts the harmonics anew in each step, so their phases jump after the old
    excitation, and its two fades add up to 1.08. With `seamless` the phases continue (the slot's
    first draw stays) and the fades add up to 1. Example: steps of 14 and 20 frames, overlap 8.

        In:  14 new frames                  20 new frames
             vocoded: 0-13                  vocoded: 6-33
        Out: samples of frames 0-5          samples of frames 6-25, of which 6-13 are cross-faded
             held back: 6-13                held back: 26-33
    """
    overlap, rate = hift.config.overlap, hift.config.samples_per_frame
    window, total = append(state.mel, state.num_held, mel, frames)
    runs = ((frames > 0) & (total >= overlap)) | final
    size, hold = total * rate, overlap * rate

    f0 = hift.f0(window, total)
    harmonics = jnp.arange(1, phase.shape[1] + 1)
    turns = 2 * jnp.pi * hift.cycles(f0)[..., None] * harmonics  # [B, overlap + F, H], frame ends
    rise, fall = np.split(np.hamming(2 * hold).astype(np.float32), 2)
    if seamless:
        phase = jnp.where(state.vocoded[:, None], state.phase - turns[:, overlap - 1], phase)
        fall = 1 - rise
    source = replace_head(hift.source(f0, phase, noise), state.source, state.vocoded)
    samples = hift.decode(window, total, source)
    faded = samples[:, :hold] * rise + state.samples * fall
    samples = replace_head(samples, faded, state.vocoded)
    counts = jnp.where(runs, jnp.where(final, size, size - hold), 0)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(runs[:, None], new, old)

    after = HiftState(
        mel=last(window, total, overlap),
        num_held=jnp.where(final, 0, jnp.minimum(total, overlap)),
        vocoded=(state.vocoded | runs) & ~final,
        source=keep(last(source, size, hold), state.source),
        samples=keep(last(samples, size, hold), state.samples),
        phase=keep((phase + last(turns, total, 1)[:, 0]) % (2 * jnp.pi), state.phase),
    )
    return after, trim(samples, counts), counts


def append(old: Array, num_held: Array, new: Array, count: Array) -> tuple[Array, Array]:
    """The first `num_held` [B] steps of old [B, S, D], then the first `count` [B] of new [B, F, D].

    Returns them as [B, S + F, D] with zeros after the last step, and how many there are [B].
    """

    def place(row: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, start, 0)

    padded = jnp.pad(old, ((0, 0), (0, new.shape[1]), (0, 0)))
    total = num_held + count
    return trim(jax.vmap(place)(padded, new, num_held), total), total


def last(x: Array, lengths: Array, size: int) -> Array:
    """The last `size` of the `lengths` [B] steps of x [B, T, ...]; of a shorter row, the first."""

    def cut(row: Array, end: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, jnp.maximum(end - size, 0), size)

    return jax.vmap(cut)(x, lengths)


def replace_head(x: Array, head: Array, rows: Array) -> Array:
    """x [B, T] with head [B, S] in place of its first S samples, where `rows` [B] is True."""
    size = head.shape[1]
    return jnp.concatenate([jnp.where(rows[:, None], head, x[:, :size]), x[:, size:]], axis=1)

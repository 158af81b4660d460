"""What the rest of the program needs of a vocoder. CONTRIBUTING.md lists the steps of adding one.

B slots, F mel frames of a step at most, M mel bins.
"""

from typing import Any, Protocol

import jax

Array = jax.Array
State = Any  # a pytree of arrays whose first axis is the slot


class Vocoder(Protocol):
    """Mel frames to samples at 24 kHz, step by step, for all slots of a batch at once.

    A vocoder is an nnx.Module made from its config, which states `kind`, the name under which the
    class is registered (VOCODERS in this package's __init__.py), `samples_per_frame`, `mels`, and
    `overlap`, how many mel frames it holds back from one step to the next (0 if none).
    """

    def empty_state(self, batch: int) -> State:
        """The state of `batch` slots before their first frames."""
        ...

    def restart(self, state: State, slots: Array) -> State:
        """Begin new streams where `slots` [B] is True; the other slots do not change."""
        ...

    def step(
        self, state: State, mel: Array, frames: Array, final: Array, keys: Array, seamless: bool
    ) -> tuple[State, Array, Array]:
        """A step's new frames -> (state, samples [B, T], sample counts [B]).

        T = (overlap + F) * samples_per_frame; samples are left-aligned, with zeros after the last.
        mel [B, F, M]: the new frames of each slot, left-aligned; frames [B]: how many they are, 0
        to F; final [B] bool: no more frames will come, so nothing is held back. keys [B]: PRNG keys
        of this step, for vocoders that draw noise. seamless: whether to join the pieces without the
        jumps of the released decoder, where a vocoder has a choice.

        A slot's samples must not depend on the other slots. A slot without new frames that is not
        final does not change.
        """
        ...

"""Whole answers at once: units to samples in one pass of the flow and one of the vocoder.

For synthesis without streaming (the released decoder calls this offline). The engine computes the
same parts step by step (generate/streaming_step.py); here evaluate/copies.py calls `vocode`, and
only tests call `synthesize` and `change_speed`.
B rows, n units, F = 2n mel frames, M mel bins.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.models.model import Model

Array = jax.Array


def synthesize(
    model: Model, units: Array, lengths: Array, voice: Array, keys: Array, speed: float = 1.0
) -> tuple[Array, Array]:
    """Right-padded units [B, n] of `lengths` [B] -> (samples [B, T] at 24 kHz, their counts [B]).

    voice: x-vectors [B, 192]; keys [B]: PRNG keys of the vocoder's noise; speed: 2.0 halves the
    duration. Raises ValueError if the units are longer than the flow's noise.
    Reference: SpeechDecoder.token2wav with stream=False.
    """
    mel, frames = model.flow(units, lengths, model.flow.voice(voice))
    if speed != 1:
        mel, frames = change_speed(mel, frames, speed)
    return vocode(model, mel, frames, keys)


def vocode(model: Model, mel: Array, frames: Array, keys: Array) -> tuple[Array, Array]:
    """Mel [B, F, M], of `frames` [B] frames -> (samples [B, T] at 24 kHz, their counts [B]).

    keys [B]: PRNG keys of the vocoder's noise.
    """
    state, final = model.vocoder.empty_state(len(mel)), jnp.ones(len(mel), bool)
    _, samples, counts = model.vocoder.step(state, mel, frames, final, keys, seamless=True)
    return samples, counts


def change_speed(mel: Array, frames: Array, speed: float) -> tuple[Array, Array]:
    """Stretch mel [B, F, M] in time by linear interpolation -> (mel, frames [B]).

    A row of `frames` [B] frames becomes one of int(frames / speed) frames. For whole utterances
    only. Reference: the `speed` of SpeechDecoder.token2wav.
    """
    sizes = np.array([int(count / speed) for count in range(mel.shape[1] + 1)])
    stretched = jnp.asarray(sizes)[frames]
    centres = (jnp.arange(sizes[-1]) + 0.5) * (frames / jnp.maximum(stretched, 1))[:, None] - 0.5
    position = jnp.clip(centres, 0, jnp.maximum(frames - 1, 0)[:, None])
    below = position.astype(jnp.int32)
    above = jnp.minimum(below + 1, mel.shape[1] - 1)
    weight = (position - below)[..., None].astype(mel.dtype)

    def frames_at(index: Array) -> Array:
        return jnp.take_along_axis(mel, index[..., None], axis=1)

    return frames_at(below) * (1 - weight) + frames_at(above) * weight, stretched

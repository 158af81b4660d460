"""Copies of recordings by the decoder's parts, so that each part can be blamed alone.

    vocoder  the recording's mel -> wave
    flow     the recording's units -> mel
    chain    the recording's units -> mel -> wave

N samples at 24 kHz, U units, T = 2 U mel frames, M mel bins.
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.config import FRAMES_PER_UNIT, UNITS_PER_SECOND, Omni2Config
from omni2_jax.models import speaker, speech_tokenizer
from omni2_jax.models.model import Model
from omni2_jax.models.offline import vocode

Array = jax.Array

NEEDS = {  # path -> the parts that it runs through
    "vocoder": ("vocoder",),
    "flow": ("speech_tokenizer", "flow"),
    "chain": ("speech_tokenizer", "flow", "vocoder"),
}
UNIT_SAMPLES = recordings.OUTPUT_RATE // UNITS_PER_SECOND
ROUND_TO = 2 * UNITS_PER_SECOND  # units; recordings are padded to 2 s, 4 s, ...: few compilations


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy. mel: [T, M]. samples: float32 [N], None of the flow alone. seconds: to compute it."""

    mel: np.ndarray
    samples: np.ndarray | None
    seconds: float


def paths(directory: Path) -> dict[str, list[str]]:
    """For each path the parts that the checkpoint lacks; none of a path that can be run.

    Raises ValueError if no path can be run, or if the units of tokenizer and flow differ.
    """
    config, stored = Omni2Config.load(directory / "config.json"), parameters.parts(directory)
    lacking = {
        path: [part for part in parts if part not in stored] for path, parts in NEEDS.items()
    }
    if all(lacking.values()):
        raise ValueError(
            f"{directory} can copy nothing: it needs a vocoder, or a speech tokenizer and a flow"
        )
    if not lacking["flow"]:
        units = speech_tokenizer.load_config(directory).units
        if units != config.flow.units:
            raise ValueError(
                f"{directory}: its speech tokenizer makes {units} units, its flow reads"
                f" {config.flow.units}"
            )
    return lacking


class CopyMaker:
    """Makes copies with a checkpoint. voice: the flow's, a stored one's name or a prompt's file.

    Without it the first stored voice is taken, else that of each recording itself, by the speaker
    encoder; a flow of one voice needs none. vocoder_only: make no copies by the flow, even if there
    is one. Raises ValueError as `paths`, with `vocoder_only` if there is no vocoder, for a damaged
    file, and if there is no voice.
    """

    def __init__(self, directory: Path, voice: str | None = None, vocoder_only: bool = False):
        self.paths = [path for path, lacking in paths(directory).items() if not lacking]
        if vocoder_only:
            if "vocoder" not in self.paths:
                raise ValueError(f"{directory} has no vocoder")
            self.paths = ["vocoder"]
        stored = parameters.parts(directory)
        config = Omni2Config.load(directory / "config.json")
        self.config = config.only(*(p for p in ("flow", "vocoder", "speaker") if p in stored))
        self.model: Model = nnx.merge(*parameters.load(directory, self.config, jnp.float32))
        self.tokenizer = None
        if "flow" in self.paths:
            self.tokenizer = speech_tokenizer.load(directory)
        self.x_vector = None
        if self.tokenizer and (voice or voices.names(directory) or not self.config.speaker):
            self.x_vector = voices.resolve(directory, config, voice)
        self.split = nnx.split(self.model)
        self.compiled: set[tuple[str, int]] = set()

    def __call__(self, samples: np.ndarray) -> dict[str, Copy]:
        """Samples [N], a whole number of units -> a copy by each path that can be run.

        Raises ValueError for a recording without a whole unit, or beyond the flow's noise.
        """
        units = len(samples) // UNIT_SAMPLES
        if not units:
            raise ValueError(f"a recording of {len(samples)} samples has no whole unit (40 ms)")
        size = -(-units // ROUND_TO) * ROUND_TO
        padded = np.pad(samples[: units * UNIT_SAMPLES], (0, (size - units) * UNIT_SAMPLES))
        inputs = {"frames": jnp.array([FRAMES_PER_UNIT * units])}
        made: dict[str, Copy] = {}
        if "vocoder" in self.paths:
            mel = features.mel24k(jnp.asarray(padded)[None])
            made["vocoder"] = self.run("vocoder", units, inputs | {"mel": mel})
        if self.tokenizer is not None:
            path = "chain" if "chain" in self.paths else "flow"
            copy = self.run(path, units, inputs | self.conditions(samples, size))
            made |= {"flow": Copy(copy.mel, None, copy.seconds), path: copy}
        return made

    def conditions(self, samples: np.ndarray, size: int) -> dict[str, Array]:
        """Units [1, size] of a recording and the x-vector [1, E] to speak them with."""
        assert self.tokenizer is not None
        wav = recordings.resample(samples, recordings.OUTPUT_RATE, recordings.INPUT_RATE)
        count = size * recordings.INPUT_RATE // UNITS_PER_SECOND
        padded = jnp.asarray(np.pad(wav[:count], (0, max(0, count - len(wav)))))[None]
        found, _ = speech_tokenizer.tokenize(self.tokenizer, padded, jnp.array([len(wav[:count])]))
        x_vector = self.x_vector
        if x_vector is None:
            x_vector = speaker.embed(self.model.speaker, jnp.asarray(wav)[None])[0]
        return {"units": found[:, :size], "x_vector": jnp.asarray(x_vector)[None]}

    def run(self, path: str, units: int, inputs: Mapping[str, Array]) -> Copy:
        """The copy of a path, and the time that it took after compilation."""
        size = next(value.shape[1] for name, value in inputs.items() if name in ("mel", "units"))
        graph, params = self.split
        if (path, size) not in self.compiled:
            self.compiled.add((path, size))
            jax.block_until_ready(compute(graph, path, params, inputs))
        start = time.perf_counter()
        mel, samples = jax.device_get(compute(graph, path, params, inputs))
        seconds = time.perf_counter() - start
        wave = None if samples is None else np.array(samples[0, : units * UNIT_SAMPLES])
        return Copy(np.array(mel[0, : FRAMES_PER_UNIT * units]), wave, seconds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compute(
    graph: nnx.GraphDef, path: str, params: nnx.State, inputs: Mapping[str, Array]
) -> tuple[Array, Array | None]:
    """Mel [1, T, M] and, unless `path` is "flow", samples [1, N]."""
    model, frames = nnx.merge(graph, params), inputs["frames"]
    if path == "vocoder":
        mel = inputs["mel"]
    else:
        voice = model.flow.voice(inputs["x_vector"])
        mel, frames = model.flow(inputs["units"], frames // FRAMES_PER_UNIT, voice)
    if path == "flow":
        return mel, None
    samples, _ = vocode(model, mel, frames, jax.random.split(jax.random.key(0), 1))
    return mel, samples

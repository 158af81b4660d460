"""`omni2 frames`: the speech encoder's frames of a data set, computed once for the stages 1a and 2.

The encoder is frozen in every stage, and most of a step's time goes to it. With the frames on disk
it is not loaded, and no question is read. A window takes T * D numbers: 3.8 MB for 30 s of
large-v3, 0.4 MB for 10 s of Whisper tiny.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from omni2_jax import files, sharding
from omni2_jax.devices import Device
from omni2_jax.train import weights
from omni2_jax.train.encoder_frames import EncoderFrames, origin, stored_dtype
from omni2_jax.train.examples import Item, Row
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.stages.speech_to_text import encode_questions


def compute(train: TrainConfig, out: Path, devices: Sequence[Device] | None = None) -> None:
    """Write the frames that a run with these settings reads; `out` appears whole or not at all.

    devices: default all. Raises ValueError for a stage that reads no frames, and what `Run` raises.
    """
    if "frames" not in stage_of(train).settings:
        raise ValueError(f"a run of stage {train.stage} reads no frames; the stages 1a and 2 do")
    train = dataclasses.replace(train, frames=None, microbatches=1, steps=None, epochs=1.0)
    off = {"hidden": None, "replay": 0.0, "replay_data": None, "ctc": 0.0, "ctc_steps": 0}
    train = dataclasses.replace(train, **off)
    with files.atomic_directory(out) as work:
        run = Run(train, work / "run", devices)
        config = run.config.speech_encoder
        assert config is not None
        with sharding.use(run.mesh):
            loaded, trained, frozen = weights.load(run.stage, run.start, run.mesh)
            values = frozen | trained

            @jax.jit
            def encode(values: weights.Params, audio: jax.Array) -> jax.Array:
                frames = encode_questions(loaded.model(values), train, {"audio": audio})
                return frames.reshape(*audio.shape[:2], *frames.shape[1:])

            def frames(batch: dict[str, jax.Array]) -> np.ndarray:
                return np.asarray(encode(values, batch["audio"][0]).astype(dtype))

            dtype = stored_dtype(train)
            metadata = {"width": config.width, "dtype": dtype, **origin(train, run.config)}
            for name, split in {"data": run.data, "validation": run.validation}.items():
                if split is not None:
                    rows = EncoderFrames.arrays(split, frames, of_segments)
                    EncoderFrames.write(work / name, split, metadata, rows)


def of_segments(frames: np.ndarray, row: Row, item: Item) -> np.ndarray:
    """Of the frames [C, T, D] of a row those of the segments that it has, [C' * T, D]."""
    return frames[: item.size.segments].reshape(-1, frames.shape[-1])

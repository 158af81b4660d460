"""Frames of the speech encoder on disk. T frames of all segments of a dialogue, D encoder width."""

from omni2_jax import remote
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stored_arrays import StoredArrays


class EncoderFrames(StoredArrays):
    """The frames [T, D] of a dialogue's questions, one window after the other."""

    name = records = "frames"
    content, command = "encoder frames", "omni2 frames"
    other = "or by another speech encoder, or for another window"

    @classmethod
    def of(
        cls, train: TrainConfig, config: Omni2Config, data: Dataset, split: str
    ) -> "EncoderFrames | None":
        """Those that the setting `frames` names; None without it.

        Raises ValueError if they cannot be used with this run's speech encoder.
        """
        if train.frames is None:
            return None
        assert config.speech_encoder is not None
        path = remote.as_path(train.frames) / split
        return cls(path, data, config.speech_encoder.width, **origin(train, config))


def origin(train: TrainConfig, config: Omni2Config) -> dict[str, object]:
    """What frames depend on beside the data: the encoder's parameters, and its window."""
    assert config.speech_encoder is not None
    fingerprint = parameters.fingerprint(remote.as_path(train.checkpoint), "speech_encoder")
    return {"encoder": fingerprint, "window": config.speech_encoder.frames}


def stored_dtype(train: TrainConfig) -> str:
    """How frames are kept: bfloat16 as it is computed; float32 is rounded to float16."""
    return "float16" if train.dtype == "float32" else train.dtype

"""Hidden states of the LLM on disk. n text tokens of a dialogue's replies, D LLM width."""

import math

from omni2_jax import remote
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stored_arrays import StoredArrays

# A 7B model has 15 GB of matrices, and each run would read them. Training changes the norms and
# biases as well, which are smaller than this. Low-rank updates leave them as they are, but their
# stage trains the adapter, too.
SMALL_BYTES = 4 * 2**20


class HiddenStates(StoredArrays):
    """The states [n, D] behind the text tokens of a dialogue's replies."""

    name, records = "hidden", "states"
    content, command = "hidden states", "omni2 hidden"
    other = "or by another adapter, LLM or speech encoder"

    @classmethod
    def of(
        cls, train: TrainConfig, config: Omni2Config, data: Dataset, split: str
    ) -> "HiddenStates | None":
        """Those that the setting `hidden` names; None without it.

        Raises ValueError if they cannot be used with this run's checkpoint.
        """
        if train.hidden is None:
            return None
        assert config.llm is not None
        path = remote.as_path(train.hidden) / split
        return cls(path, data, config.llm.width, **origin(train))


def origin(train: TrainConfig) -> dict[str, object]:
    """What hidden states depend on beside the data: a hash of the adapter, and of the small arrays
    of LLM and speech encoder. None for a part that the checkpoint lacks."""
    directory = remote.as_path(train.checkpoint)
    limits = {"adapter": math.inf, "llm": SMALL_BYTES, "speech_encoder": SMALL_BYTES}
    present = parameters.parts(directory)
    return {
        part: parameters.fingerprint(directory, part, limit) if part in present else None
        for part, limit in limits.items()
    }

"""Hidden states of the LLM on disk, one record for each dialogue. n text tokens of its replies, D
LLM width.

DIR/data/hidden.json                                the data they were made from, and the record of
each dialogue DIR/data/states-00000-of-00003.array_record         [n, D]; DIR/validation/ likewise
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from omni2_jax import remote
from omni2_jax.files import first_line
from omni2_jax.train.data.dataset import Dataset, RecordError


class HiddenStates:
    """The states of a data set's dialogues.

    Raises ValueError if the files are missing or damaged, or were made from other data or by a
    model of another width.
    """

    def __init__(self, path: Path, data: Dataset, width: int):
        self.path, self.width = path, width
        try:
            metadata = json.loads((path / "hidden.json").read_text())
            self.dtype, self.places = jnp.dtype(metadata["dtype"]), metadata["places"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} holds no hidden states; omni2 hidden computes them") from None
        if metadata.get("data") != identity(data) or metadata.get("width") != width:
            raise ValueError(
                f"{path} was made from other data than {data.path}, "
                f"or by an LLM of another width than {width}"
            )
        try:
            self.source = ArrayRecordDataSource(
                sorted(map(str, remote.local_copy(path).glob("states-*-of-*.array_record")))
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}") from None
        # hidden.json has no checksum; a wrong place would give a dialogue another one's states.
        used = [place for place in self.places if place is not None]
        if set(used) != set(range(len(self.source))) or len(used) != len(self.source):
            raise ValueError(f"{path} is damaged: its hidden.json does not name each record once")

    def read(self, dialogue: int, count: int) -> np.ndarray:
        """The states [count, D] of a dialogue's text tokens. Raises RecordError if damaged."""
        try:
            record = self.source[self.places[dialogue]]
            return np.frombuffer(record, self.dtype).reshape(count, self.width)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise RecordError(
                f"{self.path}: the states of dialogue {dialogue} are damaged: {first_line(error)}"
            ) from None


def identity(data: Dataset) -> dict:
    """What a data set's own description says, to recognise it."""
    return dataclasses.asdict(data.info)

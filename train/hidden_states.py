"""Hidden states of the LLM on disk, one record a dialogue. n text tokens of its replies, D LLM width.

DIR/data/hidden.json                                what they were made from, and which record is which dialogue's
DIR/data/states-00000-of-00003.array_record         [n, D]; DIR/validation/ likewise
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from omni2_jax.files import first_line
from omni2_jax.train.data.dataset import Dataset, RecordError


class States:
    """States of a data set's dialogues. Raises ValueError if they are those of other data, or of another model's width."""

    def __init__(self, path: Path, data: Dataset, width: int):
        self.path = path
        try:
            told = json.loads((path / "hidden.json").read_text())
            self.dtype, self.places = jnp.dtype(told["dtype"]), told["places"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} holds no hidden states; make them with python -m train.hidden"
            ) from None
        if told.get("data") != identity(data) or told.get("width") != width:
            raise ValueError(
                f"{path} was made from other data than {data.path}, or by an LLM of another width than {width}"
            )
        try:
            self.source = ArrayRecordDataSource(
                sorted(map(str, path.glob("states-*-of-*.array_record")))
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}") from None
        self.width = width

    def read(self, dialogue: int, count: int) -> np.ndarray:
        """The states [count, D] of a dialogue's text tokens, in their order. Raises RecordError."""
        try:
            return np.frombuffer(self.source[self.places[dialogue]], self.dtype).reshape(
                count, self.width
            )
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise RecordError(
                f"{self.path}: the states of dialogue {dialogue} are damaged: {first_line(error)}"
            ) from None


def identity(data: Dataset) -> dict:
    return dataclasses.asdict(data.info)

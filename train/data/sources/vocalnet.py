"""VocalNet's JSON: {"id", "speech", "conversations": [{"from", "value"}], "units": "....npy"}.

These are the Hugging Face data sets VocalNet/VoiceAssistant-430K-vocalnet and
VocalNet/UltraChat-vocalnet. `speech` is the recording of the human turn whose value is "<speech>";
what was asked is not written down, so the turn's text is "<speech>", too (`records.UNWRITTEN`), and
nothing else that stands beside it. `units` are CosyVoice 2's for the last reply. Paths begin with
the data set's folder, in which the JSON lies.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omni2_jax.files import first_line, short
from omni2_jax.train.data.records import UNWRITTEN, Turn
from omni2_jax.train.data.sources.base import (
    Format,
    Sound,
    SourceDialogue,
    SourceError,
    checked,
    parse_text,
    parse_units,
    stated_path,
)
from omni2_jax.train.data.sources.json_files import json_array

ROLES = {"human": "user", "gpt": "assistant"}
MAX_UNITS_FILE = 2**22  # bytes; ten minutes of units are 120 KB
# What the pickle of an array, and of a dict of arrays, names. Everything else a pickle could run.
PICKLED = {
    (f"numpy.{core}multiarray", name)
    for core in ("core.", "_core.")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


def parse(item: Mapping, file: Path, name: str) -> SourceDialogue:
    """The dialogue of an item. Raises SourceError."""
    if not isinstance(item.get("conversations"), list):
        raise SourceError("no turns", "there is no list 'conversations'")
    turns: list[Turn] = []
    sounds: list[Sound | None] = []
    sound = stated_path(item.get("speech"), "speech", "the dialogue")
    for index, fields in enumerate(item["conversations"]):
        if not isinstance(fields, Mapping):
            raise SourceError("no turns", f"turn {index} is {short(fields)}, expected an object")
        text = parse_text(fields.get("value"), f"turn {index}")
        role = str(fields.get("from"))
        spoken = UNWRITTEN in text and role == "human"
        turns.append(Turn(ROLES.get(role, role), UNWRITTEN if spoken else text))
        sounds.append(located(file, sound) if sound and spoken else None)
    if turns and (stated := stated_path(item.get("units"), "units", "the dialogue")):
        units = read_units(located(file, stated), f"turn {len(turns) - 1}")
        turns[-1] = Turn(turns[-1].role, turns[-1].text, units)
    return checked(name, turns, sounds)


def located(file: Path, stated: str) -> Path:
    """A file of the data set: its stated path begins with the folder in which the JSON lies."""
    beside = file.parent / stated
    return beside if beside.exists() else file.absolute().parent.parent / stated


def read_units(path: Path, context: str) -> np.ndarray | None:
    """The units int32 [U] of a .npy: an array, or a dict with the array `speech_token`, [U] or
    [1, U]. Raises SourceError, which begins with `context`.
    """
    try:
        if path.stat().st_size > MAX_UNITS_FILE:
            raise ValueError(f"it has more than {MAX_UNITS_FILE} bytes")
        value = read_array(path.read_bytes())
        if value.dtype == object:
            value = np.asarray(value.item()["speech_token"])
        if value.dtype.kind not in "iu":
            raise ValueError(f"its numbers are {value.dtype}, expected integers")
    except OSError as error:
        raise SourceError("units missing", f"{context}: {path}: {error.strerror}") from None
    except Exception as error:  # a pickle may fail in any way
        message = f"{context}: {path} holds no units: {first_line(error)}"
        raise SourceError("units unreadable", message) from None
    return parse_units(value.ravel().tolist(), context)


def read_array(content: bytes) -> np.ndarray:
    """The array of a .npy. An array of objects may hold arrays and plain Python values only.

    Raises ValueError, EOFError or pickle.UnpicklingError for another content.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None or not read_header(file)[2].hasobject:
        return np.load(io.BytesIO(content), allow_pickle=False)
    return ArrayUnpickler(file).load()


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of NumPy arrays in dicts and lists, and refuses to import anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which is not read")
        return super().find_class(module, name)


FORMAT = Format(json_array, parse)

"""Conversations in JSON, a turn an object: four formats.

questions    a JSON array, the released example format:
             {"id", "conversation": [{"from": "human" | "gpt", "text", "speech", "units"}]}
             `speech` is relative to the file, or else to the working directory. A reply may bring
             it, and `units`, which the released examples lack.
jsonl        a .jsonl file, or a folder with data.jsonl. Each line is
             {"id", "turns": [{"role": "user" | "assistant", "text", "audio", "units"}]}
             `audio` is relative to the file.
recordings   a .jsonl file, or a folder with metadata.jsonl: recordings of a voice with their text,
             for the stages of the decoder (`units`, `flow`) and for stage 1b. Each line is
             {"audio", "text", "id", "units"}; `audio` is relative to the file, `id` and `units` may
             be left out.
instructs2s  instruct_en_200k_data_cosy2.json of the Hugging Face data set ICTNLP/InstructS2S-200K:
             as `questions`, but the units (CosyVoice 2's) are called `unit`; `speech` is sought
             where the archives unpack beside the file, en/wav/DIR/NAME.wav
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.files import short
from omni2_jax.generate.questions import sound_path
from omni2_jax.train.data.records import Turn
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
from omni2_jax.train.data.sources.json_files import json_array, json_lines

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Keys:
    """The keys of a dialogue's turns and, in a turn, of its role, recording and units.

    resolve: the path of a recording, from the path of the source and the stated one.
    """

    turns: str
    role: str
    sound: str
    units: str
    resolve: Callable[[Path, str], Path]


def parse(item: Mapping, file: Path, name: str, keys: Keys) -> SourceDialogue:
    """The dialogue of a JSON object. Raises SourceError."""
    if not isinstance(item.get(keys.turns), list):
        raise SourceError("no turns", f"there is no list {keys.turns!r}")
    turns: list[Turn] = []
    sounds: list[Sound | None] = []
    for index, fields in enumerate(item[keys.turns]):
        context = f"turn {index}"
        if not isinstance(fields, Mapping):
            raise SourceError("no turns", f"{context} is {short(fields)}, expected an object")
        path = stated_path(fields.get(keys.sound), keys.sound, context)
        sounds.append(None if path is None else keys.resolve(file, path))
        role = str(fields.get(keys.role))
        role = ROLES.get(role, role)
        # Units of the user's turns are not used.
        units = parse_units(fields.get(keys.units), context) if role != "user" else None
        silent = role == "user" and path is not None
        turns.append(Turn(role, parse_text(fields.get("text"), context, silent), units))
    return checked(name, turns, sounds)


def beside(file: Path, sound: str) -> Path:
    """A recording of a .jsonl."""
    return file.parent / sound


def unpacked(file: Path, sound: str) -> Path:
    """A recording of the released archives: the longest end of its stated path that exists, beside
    the file or in en/wav."""
    parts = Path(sound).parts
    roots = (file.parent, file.parent / "en" / "wav")
    for start, root in itertools.product(range(len(parts)), roots):
        path = root.joinpath(*parts[start:])
        if os.path.exists(path):
            return path
    return file.parent / sound


def recording_lines(file: Path) -> Iterator[tuple[object, float]]:
    """The lines of recordings with their text, each as a dialogue of a single assistant turn."""
    for item, done in json_lines(file):
        if isinstance(item, Mapping):
            item = {**item, "turns": [{**item, "role": "assistant"}]}
        yield item, done


def conversation_format(items: Callable, keys: Keys) -> Format:
    return Format(items, functools.partial(parse, keys=keys))


QUESTIONS = conversation_format(
    json_array, Keys("conversation", "from", "speech", "units", sound_path)
)
JSONL = conversation_format(json_lines, Keys("turns", "role", "audio", "units", beside))
RECORDINGS = conversation_format(recording_lines, Keys("turns", "role", "audio", "units", beside))
INSTRUCTS2S = conversation_format(
    json_array, Keys("conversation", "from", "speech", "unit", unpacked)
)

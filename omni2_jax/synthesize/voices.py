"""The voices file in YAML: which programs speak, with which voices, and how clips are changed.

    engines:
      espeak:
        command: [espeak-ng, -v, "{voice}", -s, "{speed}", -w, "{out}", -f, "{text_file}"]
        settings: {speed: [165, 140, 190]}
        lists: [[espeak-ng, --voices], [espeak-ng, --voices=variant]]
      piper:
        command: [piper, --model, "{voice}", --output-dir, "{out_dir}"]
        keep_running: true
      cosyvoice:
        endpoint: http://localhost:8000/v1
        model: cosyvoice2
    questions:                # one voice is drawn for each dialogue
      - {engine: espeak, voices: [en-us, en-gb], variants: [f1, m3], weight: 3}
      - {engine: cosyvoice, voices: [anna, ben]}
    held_out:                 # these only speak for the evaluation
      - {engine: espeak, voices: [en-us], variants: [f5]}
    replies: {engine: piper, voice: $PIPER_VOICE}
    augment: {share: 0.3, speed: [0.9, 1.1], gain: [-12, 3], noise: [5, 30]}
    checks: {seconds_per_character: [0.02, 0.25], clipped: 0.005}

engines   each has either a command or an endpoint.
  command       a program and its arguments, run without a shell. {text}, {text_file} (a file with
                the text), {voice}, {out} (the wav to write) and the names of `settings` are
                replaced; {seed} is another number for each clip and attempt
  keep_running  the program runs on: it is given a text a line, and answers each with a line on
                stdout or stderr that ends with the name of the wav, which it wrote to {out_dir}
  endpoint      the URL of an OpenAI-compatible server, without /audio/speech; model: its `model`;
                key_variable: the environment variable with its key
  settings      names and their values. One value is drawn for each dialogue's questions; replies
                take the first. An endpoint knows `speed`
  lists         commands that print the names of all voices. Some programs speak with another voice
                if they do not know one; without lists, only a probe finds voices that do not exist
  timeout       seconds that a clip may take (60)
questions, held_out   `variants` are joined to each voice by "+"; a `weight` (1) says how often an
          entry is drawn. In each entry, all voices are drawn equally often
replies   the one voice that answers
augment   what happens to questions, see `augment`
checks    what clips must be like, see `clip_checks`

$NAME and ${NAME} are environment variables.
"""

import hashlib
import json
import os
import random
import re
import string
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni2_jax.synthesize.augment import Augment
from omni2_jax.synthesize.clip_checks import Checks
from omni2_jax.synthesize.located_yaml import LocatedYaml

Setting = str | float | int
PLACEHOLDERS = {"text", "text_file", "voice", "out", "out_dir", "seed"}
VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class Entry(BaseModel):
    """A mapping of the file, which has exactly these names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineEntry(Entry):
    command: tuple[str, ...] = ()
    keep_running: bool = False
    endpoint: str = ""
    model: str = "tts-1"
    key_variable: str = "OPENAI_API_KEY"
    settings: dict[str, Annotated[tuple[Setting, ...], Field(min_length=1)]] = {}
    lists: tuple[tuple[str, ...], ...] = ()
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60

    @model_validator(mode="after")
    def check(self) -> "EngineEntry":
        if bool(self.command) == bool(self.endpoint):
            raise ValueError("expected either a command or an endpoint")
        if self.endpoint:
            if unknown := set(self.settings) - {"speed"}:
                raise ValueError(f"an endpoint has no setting {min(unknown)!r}, only speed")
            return self
        used = {name for argument in self.command for name in placeholders(argument)}
        known = PLACEHOLDERS | set(self.settings)
        if unknown := used - known:
            names = ", ".join(sorted(known))
            raise ValueError(f"its command has {{{min(unknown)}}}, expected one of {names}")
        needed = [{"out_dir"}] if self.keep_running else [{"out"}, {"text", "text_file"}]
        for names in needed:
            if not names & used:
                raise ValueError(f"its command lacks {{{'} or {'.join(sorted(names))}}}")
        return self


class PoolEntry(Entry):
    engine: str
    voices: Annotated[tuple[str, ...], Field(min_length=1)]
    variants: tuple[str, ...] = ()
    weight: Annotated[float, Field(gt=0)] = 1

    def names(self) -> list[str]:
        """All voices of this entry."""
        if not self.variants:
            return list(self.voices)
        return [f"{voice}+{variant}" for voice in self.voices for variant in self.variants]


class ReplyEntry(Entry):
    engine: str
    voice: str


class VoicesFile(Entry):
    """The whole file."""

    engines: Annotated[dict[str, EngineEntry], Field(min_length=1)]
    questions: Annotated[tuple[PoolEntry, ...], Field(min_length=1)]
    held_out: tuple[PoolEntry, ...] = ()
    replies: ReplyEntry
    augment: Augment = Augment()
    checks: Checks = Checks()

    @model_validator(mode="after")
    def check(self) -> "VoicesFile":
        used = [*self.questions, *self.held_out, self.replies]
        for entry in used:
            if entry.engine not in self.engines:
                known = ", ".join(sorted(self.engines))
                raise ValueError(f"there is no engine {entry.engine!r}; engines are {known}")
        seen = {(entry.engine, name) for entry in self.questions for name in entry.names()}
        for entry in self.held_out:
            for name in entry.names():
                if (entry.engine, name) in seen:
                    raise ValueError(
                        f"the voice {name!r} of {entry.engine} is among questions and held_out"
                    )
        return self

    def digest(self) -> str:
        """A text that changes with the voices, also with those that environment variables name.

        The value of one in an endpoint does not count: a server may move.
        """
        content = self.model_dump(mode="json")
        for engine in content["engines"].values():
            engine["command"] = [expanded(word) for word in engine["command"]]
        for entry in (*content["questions"], *content["held_out"]):
            for names in ("voices", "variants"):
                entry[names] = [expanded(name) for name in entry[names]]
        content["replies"]["voice"] = expanded(content["replies"]["voice"])
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def used(self, replies_only: bool = False) -> dict[str, list[str]]:
        """The voices that each engine is to speak with."""
        voices: dict[str, list[str]] = {self.replies.engine: [expanded(self.replies.voice)]}
        for entry in () if replies_only else (*self.questions, *self.held_out):
            names = map(expanded, entry.names())
            voices.setdefault(entry.engine, []).extend(names)
        return {engine: list(dict.fromkeys(names)) for engine, names in voices.items()}

    def reply_voice(self) -> "Voice":
        """The voice that answers."""
        settings = self.engines[self.replies.engine].settings
        first = tuple((name, values[0]) for name, values in settings.items())
        return Voice(self.replies.engine, expanded(self.replies.voice), first)

    def draw(self, rng: random.Random, held_out: bool) -> "Voice":
        """A voice for the questions of a dialogue."""
        pool = self.held_out if held_out else self.questions
        entry = rng.choices(pool, [entry.weight for entry in pool])[0]
        settings = self.engines[entry.engine].settings
        drawn = tuple((name, rng.choice(values)) for name, values in settings.items())
        return Voice(entry.engine, expanded(rng.choice(entry.names())), drawn)


class Voice(NamedTuple):
    """A voice of an engine, and the values of the engine's settings."""

    engine: str
    name: str
    settings: tuple[tuple[str, Setting], ...] = ()

    def __str__(self) -> str:
        """ENGINE/NAME; of a voice that is a file, NAME is the file's."""
        return f"{self.engine}/{self.name.rsplit('/', 1)[-1]}"


def read_voices(path: Path, reply_voice: str | None = None) -> VoicesFile:
    """The content of a voices file. reply_voice: takes the place of `replies.voice`.

    Raises ValueError, one line, naming file, line and column of a fault.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    content = LocatedYaml(path)
    voices = content.validated(VoicesFile)
    if reply_voice is not None:
        replies = voices.replies.model_copy(update={"voice": reply_voice})
        voices = voices.model_copy(update={"replies": replies})
    for engine, names in texts_of(voices).items():
        for text in names:
            for variable in VARIABLE.findall(text):
                if variable not in os.environ:
                    place = content.place("engines", engine)
                    raise ValueError(f"{place}: the environment variable {variable} is not set")
    return voices


def texts_of(voices: VoicesFile) -> dict[str, list[str]]:
    """All texts of the engines in use that may name environment variables."""
    texts: dict[str, list[str]] = {voices.replies.engine: [voices.replies.voice]}
    for entry in (*voices.questions, *voices.held_out):
        texts.setdefault(entry.engine, []).extend(entry.names())
    for name, values in texts.items():
        engine = voices.engines[name]
        values += [
            *engine.command,
            engine.endpoint,
            *(word for one in engine.lists for word in one),
        ]
    return texts


def expanded(text: str) -> str:
    """A text with the values of its environment variables. Those that are not set stay as named."""
    return VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)


def placeholders(argument: str) -> list[str]:
    """The names in braces in an argument of a command. Raises ValueError for a lone brace."""
    parts = string.Formatter().parse(VARIABLE.sub("", argument))
    return [name for _, name, _, _ in parts if name is not None]


def filled(argument: str, values: dict[str, object]) -> str:
    """An argument of a command with its environment variables and placeholders replaced."""
    pieces = []
    end = 0
    for match in VARIABLE.finditer(argument):
        pieces += [argument[end : match.start()].format_map(values), expanded(match[0])]
        end = match.end()
    return "".join([*pieces, argument[end:].format_map(values)])

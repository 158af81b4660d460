"""A checkpoint of any dimensions from nothing: fresh parameters, and a tokenizer of its own."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni2_jax import python_files
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.parameters import ALL_PARTS
from omni2_jax.config import PARTS, Omni2Config, SpeechTokenizerConfig, TokenConfig
from omni2_jax.convert import new_tokenizer, start
from omni2_jax.convert.precision import quantized_parts
from omni2_jax.convert.release import Release
from omni2_jax.convert.vocabulary import UNIT_EOS, TextTokenizer
from omni2_jax.models.model import Model
from omni2_jax.models.speech_tokenizer import SpeechTokenizer
from omni2_jax.synthesize.records import read_dialogues

# The parts whose dimensions a part depends on, beside its own.
NEIGHBOURS = {"adapter": ("speech_encoder", "llm"), "fusion": ("llm", "speech_lm")}


@dataclasses.dataclass(frozen=True)
class Design:
    """The dimensions that a Python file states: `config`, and perhaps `speech_tokenizer`."""

    path: Path
    config: Omni2Config
    speech_tokenizer: SpeechTokenizerConfig | None = None

    @classmethod
    def read(cls, source: str) -> "Design":
        """The design in a file, or of a shipped config's name.

        Raises ValueError naming the file if it is missing, fails, or defines something else.
        """
        path = python_files.find(source, Omni2Config.__name__)
        defined = python_files.run(path)
        config, tokenizer = defined.get("config"), defined.get("speech_tokenizer")
        if not isinstance(config, Omni2Config):
            raise ValueError(f"config {path} defines no `config` of type Omni2Config")
        if not isinstance(tokenizer, SpeechTokenizerConfig | None):
            raise ValueError(f"config {path}: speech_tokenizer is no SpeechTokenizerConfig")
        return cls(path, config, tokenizer)

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that it describes."""
        config = self.config
        described = {
            "fusion": config.llm and config.speech_lm and config.mix != "text",
            "speech_tokenizer": self.speech_tokenizer,
        }
        return tuple(
            part
            for part in ALL_PARTS
            if (described[part] if part in described else getattr(config, part))
        )


def make(
    design: Design,
    given: Release,
    parts: Sequence[str] = (),
    text: Path | None = None,
    text_tokenizer: TextTokenizer | None = None,
    seed: int = 0,
) -> Release:
    """The parts that are `given`, and fresh ones beside them.

    parts: the fresh ones; empty for all that the design describes and that are not given. text:
    what the tokenizer is learnt from. text_tokenizer: that of the LLM, if it is given. Raises
    ValueError, one line, if a part is not described, if settings do not fit one another or what is
    given, or if the text is missing, unreadable or too small.
    """
    given = with_window(given, design.config)
    chosen = tuple(part for part in parts or design.parts if part not in given.params)
    check_parts(design, chosen, given)
    config = with_parts(design.config, chosen, given.config)
    tokenizer = given.speech_tokenizer
    if "speech_tokenizer" in chosen:
        tokenizer = design.speech_tokenizer
    files = dict(given.files)
    if given.config.llm is None and (config.llm or config.speech_lm):
        config, new_files = with_new_tokenizer(config, design, text)
        files |= new_files
    elif text:
        raise ValueError("--text is for a new tokenizer, but no new llm or speech_lm needs one")
    elif "speech_lm" in chosen:
        assert text_tokenizer is not None, "an LLM that is given has a tokenizer"
        config = with_tokens(config, speech_tokens(given.config.tokens, text_tokenizer))
    check_units(config, tokenizer)
    if quantized_parts(config):
        raise ValueError(f"config {design.path}: int8 weights are not trained, expected float")
    config.check()
    fresh = {part: start.fresh(part, builder(part, config, tokenizer), seed) for part in chosen}
    return dataclasses.replace(
        given,
        config=config,
        params=given.params | fresh,
        files=files,
        speech_tokenizer=tokenizer,
    )


def check_parts(design: Design, chosen: Sequence[str], given: Release) -> None:
    """Raise ValueError unless the design describes these parts, and their neighbours are there."""
    present = {*chosen, *given.params}
    for part in chosen:
        if part not in design.parts:
            known = ", ".join(design.parts)
            raise ValueError(f"config {design.path} describes no {part}; it describes {known}")
        absent = [name for name in NEIGHBOURS.get(part, ()) if name not in present]
        if absent:
            raise ValueError(f"a new {part} needs {', '.join(absent)}: name it in --parts, too")
    if not present:
        raise ValueError(f"config {design.path} describes no part at all")


def with_parts(design: Omni2Config, chosen: Sequence[str], given: Omni2Config) -> Omni2Config:
    """The design's settings, with the given parts as they are and without parts not chosen.

    The tokens, R and W of a given LLM and speech LM stay.
    """
    fields = [part for part in PARTS if part != "fusion"]
    parts = {
        part: getattr(given, part) or (getattr(design, part) if part in chosen else None)
        for part in fields
    }
    if given.llm:
        parts["tokens"] = given.tokens
    if given.speech_lm:
        parts |= {"read": given.read, "write": given.write, "units": given.units}
    return design.replace(**parts)


def with_new_tokenizer(
    config: Omni2Config, design: Design, text: Path | None
) -> tuple[Omni2Config, dict[str, Path | bytes]]:
    """The configuration with the ids of a tokenizer that is learnt from `text`, and its files."""
    if design.config.llm is None:
        raise ValueError(f"config {design.path} describes no llm, whose vocabulary is needed")
    vocabulary = design.config.llm.vocabulary
    if text is None:
        raise ValueError("give --text FILE: a new llm needs a tokenizer, which is learnt from it")
    files = new_tokenizer.learn(texts(text), vocabulary, text)
    tokens = new_tokenizer.token_ids(vocabulary)
    return with_tokens(config, tokens), {f"tokenizer/{name}": file for name, file in files.items()}


def with_tokens(config: Omni2Config, tokens: TokenConfig) -> Omni2Config:
    """The configuration with these tokens; the speech LM's vocabulary ends with the last unit."""
    speech_lm = config.speech_lm
    if speech_lm:
        speech_lm = dataclasses.replace(speech_lm, vocabulary=tokens.sep + 1 + config.units)
    return config.replace(tokens=tokens, speech_lm=speech_lm)


def speech_tokens(tokens: TokenConfig, text_tokenizer: TextTokenizer) -> TokenConfig:
    """The tokens of a new speech LM beside an LLM that is given: <sep> stands in for <speech>."""
    if UNIT_EOS not in text_tokenizer.ids:
        raise ValueError(
            f"the tokenizer in {text_tokenizer.directory} has no {UNIT_EOS}, which ends speech"
        )
    return dataclasses.replace(tokens, sep=tokens.speech, unit_eos=text_tokenizer.ids[UNIT_EOS])


def check_units(config: Omni2Config, tokenizer: SpeechTokenizerConfig | None) -> None:
    """Raise ValueError unless the speech tokenizer makes the units that the model speaks."""
    if tokenizer and (config.speech_lm or config.flow) and tokenizer.units != config.units:
        raise ValueError(
            f"speech_tokenizer.digits is {tokenizer.digits}, which makes {tokenizer.units} units; "
            f"expected units, which is {config.units}"
        )


def texts(path: Path) -> Iterator[str]:
    """The lines of a text file; the questions and replies of a .jsonl of dialogues.

    Raises ValueError naming the file if it cannot be read.
    """
    try:
        if path.suffix == ".jsonl":
            for dialogue in read_dialogues(path):
                for turn in dialogue.turns:
                    yield from (turn.question, turn.reply)
            return
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def builder(
    part: str, config: Omni2Config, tokenizer: SpeechTokenizerConfig | None
) -> Callable[[Any], Any]:
    """The function that builds a part from random keys."""
    if part == "speech_tokenizer":
        assert tokenizer is not None
        return lambda rngs: SpeechTokenizer(tokenizer, rngs)
    alone = config.only(part, *NEIGHBOURS.get(part, ()))
    return lambda rngs: getattr(Model(alone, rngs), part)


def with_window(given: Release, design: Omni2Config) -> Release:
    """The release with its speech encoder's window cut to the design's `frames`.

    Raises ValueError if the encoder has fewer.
    """
    encoder, wanted = given.config.speech_encoder, design.speech_encoder
    if encoder is None or wanted is None or encoder.frames == wanted.frames:
        return given
    if encoder.frames < wanted.frames:
        raise ValueError(
            f"speech_encoder.frames is {wanted.frames}, "
            f"but the encoder that is given has {encoder.frames} at most"
        )
    params = dict(given.params["speech_encoder"])
    params["positions"] = first_rows(params["positions"], wanted.frames)
    return dataclasses.replace(
        given,
        config=given.config.replace(
            speech_encoder=dataclasses.replace(encoder, frames=wanted.frames)
        ),
        params=given.params | {"speech_encoder": params},
    )


def first_rows(table: LazyArray, rows: int) -> LazyArray:
    """The first rows of a table."""

    def read() -> np.ndarray:
        return table.read()[:rows]

    return LazyArray((rows, *table.shape[1:]), table.dtype, read)

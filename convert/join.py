"""Parts of several checkpoints as one checkpoint: parts that were trained apart, such as a voice.

Parts that do not fit are refused by name: other numbers of units, other mel bands, another
tokenizer. An adapter of another LLM of the same size is not noticed, as its shapes are the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni2_jax import remote
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.checkpoint.parameters import ALL_PARTS
from omni2_jax.config import (
    DECODER_PARTS,
    LANGUAGE_PARTS,
    PARTS,
    Omni2Config,
    SpeechTokenizerConfig,
)
from omni2_jax.convert import vocabulary
from omni2_jax.convert.release import Release
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.model import abstract_model

GROUPS = {"language": LANGUAGE_PARTS, "decoder": DECODER_PARTS}  # names for several parts

Owners = Mapping[str, Path]  # part -> the checkpoint that it comes from


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the parts that are taken from it; none: all that no other source names."""

    directory: Path
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Source":
        """The source written as CKPT or PART,...=CKPT; a group stands for those parts that exist.

        Raises ValueError for an unknown part, a missing checkpoint, or a part that it lacks.
        """
        names, separator, path = text.rpartition("=")
        directory = remote.as_path(path)
        if not (directory / "config.json").exists():
            raise ValueError(f"{directory} is not an omni2-jax checkpoint: it has no config.json")
        if not separator:
            return cls(directory)
        present, chosen = parameters.parts(directory), []
        for name in filter(None, map(str.strip, names.split(","))):
            if name not in (*ALL_PARTS, *GROUPS):
                known = ", ".join((*GROUPS, *ALL_PARTS))
                raise ValueError(f"{name} is no part of a checkpoint; expected some of {known}")
            found = [part for part in GROUPS.get(name, (name,)) if part in present]
            if not found:
                raise ValueError(f"{directory} has no {name}; it has {', '.join(present)}")
            chosen += found
        return cls(directory, tuple(chosen))


def join(sources: Sequence[Source], fusion: bool = True) -> Release:
    """The parts of all sources together, to be written as one checkpoint.

    fusion: without it, the speech LM reads the text alone, as it does in stage 1b.

    R, W and the units are those of the speech LM's checkpoint; the prompt's limit, the tokenizer
    and `no_speech_reply` those of the LLM's; the voices those of the flow's. Raises ValueError, one
    line, if a part would come from two checkpoints, if parts do not fit one another, or if files
    are damaged.
    """
    owners = find_owners(sources)
    if not fusion:
        owners.pop("fusion", None)
    if not owners:
        raise ValueError("nothing to join: the checkpoints hold no parameters")
    configs = {path: Omni2Config.load(path / "config.json") for path in set(owners.values())}
    if not fusion:
        if "speech_lm" not in owners:
            raise ValueError("--no-fusion changes what a speech_lm reads, and there is none")
        configs[owners["speech_lm"]] = configs[owners["speech_lm"]].replace(mix="text")
    for part, path in owners.items():
        if part != "speech_tokenizer":
            configs[path].need(path / "config.json", part)
    tokenizer = None
    if "speech_tokenizer" in owners:
        tokenizer = speech_tokenizer.load_config(owners["speech_tokenizer"])
    config = joined_config(owners, configs, tokenizer)
    check_fit(config, owners, configs, tokenizer)
    shapes = abstract_model(config)[1]
    if "adapter" in owners and "adapter" not in shapes:
        raise ValueError(
            f"adapter of {owners['adapter']} has no place in the joined checkpoint: it is used "
            "with a speech_encoder and an llm; name these, too, or leave it out"
        )
    if "fusion" in owners and "fusion" not in shapes:
        raise ValueError(
            f"fusion of {owners['fusion']} has no place in the joined checkpoint: it is used with "
            'an llm and a speech_lm whose mix is not "text"; name the other parts, without fusion'
        )
    if tokenizer:
        shapes["speech_tokenizer"] = speech_tokenizer.abstract(tokenizer)[1]
    return Release(
        config,
        {part: lazy_parameters(path, part, shapes[part]) for part, path in owners.items()},
        files_of(owners),
        voices_of(owners, config),
        tokenizer,
    )


def find_owners(sources: Sequence[Source]) -> dict[str, Path]:
    """The checkpoint of each part: the one that is named for it, else the only one that has it."""
    owners: dict[str, Path] = {}
    for named in (True, False):
        claimed = dict(owners)
        for source in sources:
            if bool(source.parts) != named:
                continue
            for part in source.parts or parameters.parts(source.directory):
                if part in claimed:  # it was named
                    continue
                if part in owners:
                    raise ValueError(
                        f"{part} would come from {owners[part]} and from {source.directory}; "
                        f"name the right one: {part}=CKPT"
                    )
                owners[part] = source.directory
    return {part: owners[part] for part in ALL_PARTS if part in owners}


def joined_config(
    owners: Owners,
    configs: Mapping[Path, Omni2Config],
    tokenizer: SpeechTokenizerConfig | None,
) -> Omni2Config:
    """The settings of every part from its own checkpoint."""
    first = next(iter(owners.values()))
    llm = configs[owners.get("llm", owners.get("speech_lm", first))]
    speech_lm = configs[owners.get("speech_lm", owners.get("llm", first))]
    parts = {
        part: getattr(configs[owners[part]], part) if part in owners else None
        for part in PARTS
        if part != "fusion"
    }
    units = speech_lm.units
    if "speech_lm" not in owners:
        units = parts["flow"].units if parts["flow"] else tokenizer.units if tokenizer else units
    tokens = dataclasses.replace(
        llm.tokens, sep=speech_lm.tokens.sep, unit_eos=speech_lm.tokens.unit_eos
    )
    return speech_lm.replace(
        **parts,
        units=units,
        tokens=tokens,
        max_prompt=llm.max_prompt,
        no_speech_reply=llm.no_speech_reply,
    )


def check_fit(
    config: Omni2Config,
    owners: Owners,
    configs: Mapping[Path, Omni2Config],
    tokenizer: SpeechTokenizerConfig | None,
) -> None:
    """Raise ValueError, naming parts and checkpoints, unless the parts fit one another."""
    units = {
        "speech_lm": config.speech_lm and config.units,
        "flow": config.flow and config.flow.units,
        "speech_tokenizer": tokenizer and tokenizer.units,
    }
    check_equal("units", units, owners)
    mels = {
        "flow": config.flow and config.flow.mels,
        "vocoder": config.vocoder and config.vocoder.mels,
    }
    check_equal("mel bands", mels, owners)
    numbers = {
        "flow": config.flow and config.flow.speaker,
        "speaker": config.speaker and config.speaker.embedding,
    }
    check_equal("numbers in an x-vector", numbers, owners)
    if config.llm and config.speech_lm:
        if config.mix != "text" and "fusion" not in owners:
            raise ValueError(
                f"no fusion: the speech LM of {owners['speech_lm']} needs its own, or --no-fusion"
            )
        mixes = {
            part: configs[owners[part]].mix for part in ("speech_lm", "fusion") if part in owners
        }
        check_equal("as its mix", mixes, owners)
        check_tokenizers(owners)
    config.check()


def check_equal(what: str, values: Mapping[str, object], owners: Owners) -> None:
    """Raise ValueError unless the values of all parts (None: it has none) are equal."""
    (first, expected), *others = [*filter(lambda item: item[1], values.items())] or [("", None)]
    for part, value in others:
        if value != expected:
            raise ValueError(
                f"{part} of {owners[part]} has {value} {what}, "
                f"but {first} of {owners[first]} has {expected}"
            )


def check_tokenizers(owners: Owners) -> None:
    """Raise ValueError if the speech LM was trained with another text tokenizer than the LLM's."""
    llm, speech_lm = owners["llm"], owners["speech_lm"]
    files = [path / "tokenizer" / "tokenizer.json" for path in (llm, speech_lm)]
    if llm == speech_lm or not files[1].exists():
        return
    if not files[0].exists() or files[0].read_bytes() != files[1].read_bytes():
        vocabulary.check_same(vocabulary.read(llm / "tokenizer"), speech_lm / "tokenizer")


def lazy_parameters(directory: Path, part: str, shapes: Mapping) -> dict:
    """The stored parameters of a part. Raises ValueError if they do not have these shapes."""
    parameters.check(directory, part, parameters.flatten(shapes))
    return parameters.unflatten(shapes, parameters.stored(directory, part))


def files_of(owners: Owners) -> dict[str, Path | bytes]:
    """The tokenizers, settings of generation and release's files that belong to the parts."""
    patterns = {
        "llm": ("tokenizer/*", "generation_config.json", "assets/config.json"),
        "speech_lm": ("tts_tokenizer/*",),
        "flow": ("assets/*.yaml",) if owners.get("flow") == owners.get("vocoder") else (),
        "speaker": ("assets/*.onnx",),
    }
    if "llm" not in owners:
        patterns["speech_lm"] += ("tokenizer/*",)
    return {
        str(path.relative_to(owners[part])): path
        for part in patterns.keys() & owners.keys()
        for pattern in patterns[part]
        for path in sorted(owners[part].glob(pattern))
    }


def voices_of(owners: Owners, config: Omni2Config) -> dict:
    """The voices of the flow's checkpoint, x-vectors by name."""
    if "flow" not in owners:
        return {}
    directory = owners["flow"]
    return {
        name: voices.load(directory / "voices" / f"{name}.npy", config)
        for name in voices.names(directory)
    }

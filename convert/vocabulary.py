"""A plain Qwen2.5 tokenizer with tokens added: <speech> for the LLM; <sep> in its place, then the units, for the speech LM.

The files themselves are edited, so that whatever else they hold stays as it was, the chat template too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.checkpoint import tokenizer
from omni2_jax.checkpoint.tokenizer import SPEECH_TEXT
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.releases import read_json

SEP, UNIT_EOS = "<sep>", "<|endoftext|>"
DESCRIPTION = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
LISTS = (
    "additional_special_tokens",
    "extra_special_tokens",
)  # where files list special tokens; the second since transformers 5

Files = dict[str, Path | bytes]  # by name: a file to copy, or its content


@dataclass(frozen=True)
class Plain:
    """A tokenizer as Qwen publishes it. ids: of every token; added: how the tokens beside the BPE's are described, by id."""

    directory: Path
    ids: Mapping[str, int]
    added: Mapping[int, Mapping]

    @property
    def speech(self) -> int:
        """The id of <speech>: the next free one unless the tokenizer has it."""
        return self.ids.get(SPEECH_TEXT, len(self.ids))


def read(directory: Path) -> Plain:
    """The LLM's tokenizer. Raises ValueError when it is damaged, leaves ids out or has no chat template."""
    found = tokenizer.load(directory)
    ids = found.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise ConversionError(
            f"the tokenizer in {directory} does not number its {len(ids)} tokens from 0 to {len(ids) - 1}"
        )
    if not found.chat_template:
        raise ConversionError(
            f"the tokenizer in {directory} has no chat template; expected one in its tokenizer_config.json"
        )
    added = {
        i: {name: getattr(token, name) for name in DESCRIPTION}
        for i, token in found.added_tokens_decoder.items()
    }
    return Plain(directory, ids, added)


def check_same(plain: Plain, directory: Path) -> None:
    """Raise ConversionError unless the tokenizer in `directory` gives every token the same id: the speech LM reads the LLM's tokens."""
    theirs = tokenizer.load(directory).get_vocab()
    different = sorted(
        token
        for token in (plain.ids.keys() | theirs.keys()) - {SPEECH_TEXT}
        if plain.ids.get(token) != theirs.get(token)
    )
    if different:
        token = different[0]
        raise ConversionError(
            f"the tokenizers in {plain.directory} and {directory} differ in {len(different)} tokens: "
            f"{token!r} is {plain.ids.get(token, 'not there')} in the first, {theirs.get(token, 'not there')} in the second"
        )


def with_speech(plain: Plain) -> Files:
    """The LLM's tokenizer: <speech> behind the last token, unless it is there."""
    return edited(
        plain,
        {} if SPEECH_TEXT in plain.ids else {plain.speech: described(SPEECH_TEXT, special=True)},
    )


def with_units(plain: Plain, units: int) -> Files:
    """The speech LM's tokenizer: <sep> at the id of <speech>, then the units as tokens that decoding does not skip."""
    sep = plain.speech
    if sep < len(plain.ids) and sep != max(plain.added):
        raise ConversionError(
            f"the tokenizer in {plain.directory} has {SPEECH_TEXT} as {sep}; expected it last, where {SEP} goes"
        )
    if UNIT_EOS not in plain.ids:
        raise ConversionError(
            f"the tokenizer in {plain.directory} has no {UNIT_EOS}, which ends speech"
        )
    new = {sep: described(SEP, special=True)} | {
        sep + 1 + unit: described(f"<{unit}>", special=False) for unit in range(units)
    }
    return edited(plain, new, {"eos_token": UNIT_EOS, "pad_token": UNIT_EOS})


def described(content: str, special: bool) -> dict:
    return dict.fromkeys(DESCRIPTION, False) | {"content": content, "special": special}


def edited(
    plain: Plain, new: Mapping[int, Mapping], roles: Mapping[str, str] | None = None
) -> Files:
    """The tokenizer's files with `new` tokens, by id, beside or in the place of its own; `roles` such as eos_token are set."""
    there: Files = {
        name: plain.directory / name
        for name in tokenizer.FILES
        if (plain.directory / name).exists()
    }
    if not new:
        return there
    if taken := [token["content"] for token in new.values() if token["content"] in plain.ids]:
        raise ConversionError(
            f"the tokenizer in {plain.directory} has {', '.join(taken[:5])} already"
        )
    added = dict(sorted({**plain.added, **new}.items()))
    special = [token["content"] for token in new.values() if token["special"]]

    def listed(content: dict) -> dict:
        """A replaced token leaves the file's list of special tokens, and the new ones end it."""
        gone = {plain.added[i]["content"] for i in new.keys() & plain.added.keys()}
        lists = {
            key: [t for t in content[key] if text(t) not in gone] + special
            for key in LISTS
            if isinstance(content.get(key), list)
        }
        return content | lists | (roles or {})

    edits = {
        "tokenizer.json": lambda content: (
            content | {"added_tokens": [{"id": i, **token} for i, token in added.items()]}
        ),
        "tokenizer_config.json": lambda content: listed(content) | {"added_tokens_decoder": added},
        "added_tokens.json": lambda _: {token["content"]: i for i, token in added.items()},
        "special_tokens_map.json": listed,
    }
    for name in edits.keys() & {*there, "tokenizer_config.json"}:
        there[name] = (
            json.dumps(edits[name](read_json(plain.directory / name)), indent=2, ensure_ascii=False)
            + "\n"
        ).encode()
    return there


def text(token: str | Mapping) -> str:
    """A listed token's text; some files describe it in full."""
    return token if isinstance(token, str) else token["content"]

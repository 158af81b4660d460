"""The tokenizer of a plain language model with tokens added, for the LLM and for the speech LM.

The LLM's gets <speech>. The speech LM's gets <sep> in the place of <speech>, then the units.
The files themselves are edited, so that whatever else they hold stays, the chat template too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni2_jax.checkpoint import tokenizer
from omni2_jax.checkpoint.tokenizer import SPEECH_TEXT
from omni2_jax.convert import json_files
from omni2_jax.convert.plan import ConversionError

SEP, UNIT_EOS = "<sep>", "<|endoftext|>"
DESCRIPTION = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
# Where files list special tokens; the second since transformers 5.
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")

Files = dict[str, Path | bytes]  # by name: a file to copy, or its content


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as the language model's publisher made it.

    ids: of every token. added: id -> description of the tokens beside the BPE's.
    """

    directory: Path
    ids: Mapping[str, int]
    added: Mapping[int, Mapping[str, Any]]

    @property
    def speech(self) -> int:
        """The id of <speech>: the next free one unless the tokenizer has it."""
        return self.ids.get(SPEECH_TEXT, len(self.ids))


def read(directory: Path) -> TextTokenizer:
    """The LLM's tokenizer.

    Raises ConversionError if it leaves ids out or has no usable chat template, ValueError if it
    cannot be read at all.
    """
    loaded = tokenizer.load(directory)
    ids = loaded.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise ConversionError(
            f"the tokenizer in {directory} does not number its {len(ids)} tokens "
            f"from 0 to {len(ids) - 1}"
        )
    tokenizer.check_chat_template(loaded, directory)
    added = {
        i: {name: getattr(token, name) for name in DESCRIPTION}
        for i, token in loaded.added_tokens_decoder.items()
    }
    return TextTokenizer(directory, ids, added)


def check_same(plain: TextTokenizer, directory: Path) -> None:
    """Raise ConversionError unless the tokenizer in `directory` gives every token the same id.

    The speech LM reads the LLM's tokens.
    """
    theirs = tokenizer.load(directory).get_vocab()
    different = sorted(
        token
        for token in (plain.ids.keys() | theirs.keys()) - {SPEECH_TEXT}
        if plain.ids.get(token) != theirs.get(token)
    )
    if different:
        token = different[0]
        raise ConversionError(
            f"the tokenizers in {plain.directory} and {directory} differ in {len(different)} "
            f"tokens: {token!r} is {plain.ids.get(token, 'missing')} in the first, "
            f"{theirs.get(token, 'missing')} in the second"
        )


def with_speech(plain: TextTokenizer) -> Files:
    """The files of the LLM's tokenizer: <speech> behind the last token, unless it is there."""
    if SPEECH_TEXT in plain.ids:
        return own_files(plain)
    return edited_files(Edit(plain, {plain.speech: described(SPEECH_TEXT, special=True)}))


def with_units(plain: TextTokenizer, units: int) -> Files:
    """The files of the speech LM's tokenizer: <sep> at the id of <speech>, then the units.

    Units are ordinary tokens, so decoding does not skip them. Raises ConversionError if the
    tokenizer has such tokens already, has tokens behind <speech>, or lacks UNIT_EOS.
    """
    sep = plain.speech
    if sep < len(plain.ids) and sep != max(plain.added):
        raise ConversionError(
            f"the tokenizer in {plain.directory} has {SPEECH_TEXT} as {sep}; "
            f"expected it last, where {SEP} goes"
        )
    if UNIT_EOS not in plain.ids:
        raise ConversionError(
            f"the tokenizer in {plain.directory} has no {UNIT_EOS}, which ends speech"
        )
    new = {sep + 1 + unit: described(f"<{unit}>", special=False) for unit in range(units)}
    new = {sep: described(SEP, special=True)} | new
    return edited_files(Edit(plain, new, {"eos_token": UNIT_EOS, "pad_token": UNIT_EOS}))


def described(content: str, special: bool) -> dict[str, Any]:
    """A token as tokenizer files describe it."""
    return dict.fromkeys(DESCRIPTION, False) | {"content": content, "special": special}


def own_files(plain: TextTokenizer) -> Files:
    """The tokenizer's files as they are."""
    paths = [plain.directory / name for name in tokenizer.FILES]
    return {path.name: path for path in paths if path.exists()}


@dataclass(frozen=True)
class Edit:
    """What is changed in a tokenizer's files.

    new: id -> description of tokens beside the tokenizer's own, or in the place of them.
    roles: special tokens by role, such as eos_token.
    """

    plain: TextTokenizer
    new: Mapping[int, Mapping[str, Any]]
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def added(self) -> dict[int, Mapping[str, Any]]:
        """Every token beside the BPE's, by id in order."""
        return dict(sorted({**self.plain.added, **self.new}.items()))

    def tokenizer_json(self, content: dict[str, Any]) -> dict[str, Any]:
        tokens = [{"id": i, **token} for i, token in self.added.items()]
        return content | {"added_tokens": tokens}

    def tokenizer_config(self, content: dict[str, Any]) -> dict[str, Any]:
        return self.special_tokens(content) | {"added_tokens_decoder": self.added}

    def added_tokens(self, _: dict[str, Any]) -> dict[str, Any]:
        return {token["content"]: i for i, token in self.added.items()}

    def special_tokens(self, content: dict[str, Any]) -> dict[str, Any]:
        """The file with the roles set; in its lists the new special tokens replace the old ones."""
        replaced = [
            self.plain.added[i]["content"] for i in self.new.keys() & self.plain.added.keys()
        ]
        special = [token["content"] for token in self.new.values() if token["special"]]
        lists = {}
        for name in SPECIAL_LISTS:
            if isinstance(content.get(name), list):
                kept = [token for token in content[name] if text_of(token) not in replaced]
                lists[name] = kept + special
        return content | lists | dict(self.roles)


def edited_files(edit: Edit) -> Files:
    """The tokenizer's files with an edit.

    Raises ConversionError if the tokenizer has one of the new tokens already.
    """
    plain = edit.plain
    contents = [token["content"] for token in edit.new.values()]
    if taken := [content for content in contents if content in plain.ids]:
        raise ConversionError(
            f"the tokenizer in {plain.directory} has {', '.join(taken[:5])} already"
        )
    editors = {
        "tokenizer.json": edit.tokenizer_json,
        "tokenizer_config.json": edit.tokenizer_config,
        "added_tokens.json": edit.added_tokens,
        "special_tokens_map.json": edit.special_tokens,
    }
    files = own_files(plain)
    # The configuration lists added tokens, so it is needed even where the publisher has none.
    for name in editors.keys() & {*files, "tokenizer_config.json"}:
        content = editors[name](json_files.read(plain.directory / name))
        text = json.dumps(content, indent=2, ensure_ascii=False)
        if not json_files.encodable(text):
            raise ConversionError(
                f"{plain.directory / name} has half of a surrogate pair in a text, expected Unicode"
            )
        files[name] = f"{text}\n".encode()
    return files


def text_of(token: Any) -> str:
    """The text of a listed token; some files describe it in full."""
    return token["content"] if isinstance(token, dict) and "content" in token else str(token)

"""Tokenizers of a checkpoint: turns -> prompt ids, answer ids -> text, units <-> text."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni2_jax import remote
from omni2_jax.config import Omni2Config
from omni2_jax.files import first_line
from omni2_jax.models.model import SPEECH

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SPEECH_TEXT = "<speech>"
WRITTEN_SPEECH = "<\0speech>"  # stands for SPEECH_TEXT in a text; encoded as its two halves
ANSWER_MARKER = "\0"  # an answer that no template changes, to find its place in a prompt


def load(directory: Path) -> Any:
    """A Hugging Face tokenizer, from local files only. Raises ValueError naming the directory."""
    import transformers

    if not (directory / "tokenizer.json").exists() and not all(
        (directory / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        raise ValueError(
            f"{directory} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    transformers.logging.set_verbosity_error()
    files = remote.local_copy(directory)
    try:
        # Without the last option, transformers would ask on the terminal whether to run code.
        return transformers.AutoTokenizer.from_pretrained(
            files, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers, tokenizers and jinja raise many kinds
        raise ValueError(f"{directory} is not a readable tokenizer: {first_line(error)}") from None


# A turn of a conversation: a text, a number of segments of speech, or several of these in a row.
Turn = str | int | Sequence[str | int]


def render(
    tokenizer: Any, turns: Sequence[Turn], directory: Path, instructions: str | None = None
) -> str:
    """Turns as the chat template spells them, up to where the next answer begins.

    A segment of speech is spelled as SPEECH_TEXT; in a text, SPEECH_TEXT becomes WRITTEN_SPEECH.
    instructions: the system message; None is the template's own.
    A template that knows of thinking (Qwen3's) is asked for an answer without it: it then spells an
    empty block of thoughts, behind which the answer begins. Other templates ignore the option.
    Raises ValueError naming the tokenizer's directory if the template cannot be used.
    """

    messages = [
        {"role": "assistant" if i % 2 else "user", "content": spell(turn)}
        for i, turn in enumerate(turns)
    ]
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": spell(instructions)})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    except Exception as error:  # jinja raises many kinds, a template may raise any
        raise ValueError(
            f"the chat template of {directory} cannot be used: {first_line(error)}"
        ) from None


def spell(turn: Turn) -> str:
    """A turn as it is put into the chat template."""
    if isinstance(turn, str):
        return turn.replace(SPEECH_TEXT, WRITTEN_SPEECH)
    if isinstance(turn, int):
        return SPEECH_TEXT * turn
    return "".join(map(spell, turn))


def check_chat_template(tokenizer: Any, directory: Path) -> None:
    """Raise ValueError unless the chat template puts each turn once into the prompt."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {directory} has no chat template; "
            "expected one in its tokenizer_config.json or chat_template.jinja"
        )
    parts = render(tokenizer, [1, ANSWER_MARKER, 1], directory).split(ANSWER_MARKER)
    if len(parts) != 2 or any(part.count(SPEECH_TEXT) != 1 for part in parts):
        raise ValueError(
            f"the chat template of {directory} does not put each turn once into the prompt"
        )


class Tokenizer:
    """Turns to prompt ids, and answers to text.

    positions: how many LLM positions a segment of speech takes (300 of 30 s). Raises ValueError
    naming the directory if a tokenizer or its chat template cannot be used.
    """

    def __init__(self, directory: Path, config: Omni2Config, positions: int):
        self.directory = directory / "tokenizer"
        self.text = load(self.directory)
        check_chat_template(self.text, self.directory)
        # A model from `omni2 new` has no file for it: units follow <sep> in the order of the text
        # tokenizer's ids, as in all releases, so that 6561 of them need not be listed.
        folder = directory / "tts_tokenizer"
        self.speech = load(folder) if config.speech_lm and folder.exists() else None
        self.config = config
        self.positions = positions

    def prompt(self, turns: Sequence[Turn], instructions: str | None = None) -> list[int]:
        """Turns, the user's first -> prompt ids with SPEECH at the positions of speech features.

        The chat template is that of the released code (Qwen2.5's). instructions: the system
        message; None is the template's default system line.
        """
        return self.expand(self.encode(self.render(turns, instructions)))

    def answer(self, text: str) -> list[int]:
        """The ids of an answer's text, without an end token."""
        return self.encode(spell(text))

    def continuation(self, turn: Turn, ended: bool) -> list[int]:
        """The prompt ids that follow an answer in the cache: the user's next turn.

        ended: whether the cache holds the answer's end token already; otherwise it comes first.
        """
        rendered = self.render([1, ANSWER_MARKER, turn])
        ids = self.encode(rendered.split(ANSWER_MARKER, 1)[1])
        return self.expand(ids[1:] if ended else ids)

    def encode(self, rendered: str) -> list[int]:
        """The token ids of a text that `render` returned, or of a part of one."""
        # The halves of "<speech>" in a text are encoded apart: together they would be the token.
        parts = re.split(r"(?<=<)\0(?=speech>)", rendered)
        encoded = [self.text.encode(part, add_special_tokens=False) for part in parts]
        return [token for ids in encoded for token in ids]

    def render(self, turns: Sequence[Turn], instructions: str | None = None) -> str:
        """Turns as the chat template spells them, SPEECH_TEXT for a segment of speech.

        Raises ValueError naming the tokenizer's directory if the template cannot be used.
        """
        return render(self.text, turns, self.directory, instructions)

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Token ids with each <speech> replaced by one SPEECH id for each position of a segment."""
        speech = self.config.tokens.speech
        return [
            i for token in ids for i in ([SPEECH] * self.positions if token == speech else [token])
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """LLM tokens as text, without special tokens."""
        return self.text.decode(list(ids), skip_special_tokens=True).strip()

    def unit_text(self, speech: Sequence[int]) -> str:
        """Speech-LM tokens as the string of the released answers, "<12><6560>..."."""
        if self.speech is not None:
            return self.speech.decode(list(speech), skip_special_tokens=True)
        first = self.config.tokens.sep + 1
        runs = itertools.groupby(speech, lambda token: token >= first)
        return "".join(
            "".join(f"<{token - first}>" for token in run)
            if are_units
            else self.text.decode(list(run), skip_special_tokens=True)
            for are_units, run in runs
        )


def parse_units(text: str, units: int) -> list[int]:
    """Every number in the text that is a unit, as the released decoder script reads it."""
    return [unit for unit in map(int, re.findall(r"\d+", text)) if unit < units]

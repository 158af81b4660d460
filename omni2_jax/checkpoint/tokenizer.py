"""Tokenizers of a checkpoint: chat prompts with speech in them, text back, and units as the released scripts spell them."""

import re
from collections.abc import Sequence
from pathlib import Path

from omni2_jax.config import Omni2Config
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


def load(directory: Path):
    """A Hugging Face tokenizer from local files only; raises ValueError naming the directory."""
    import transformers

    if not (directory / "tokenizer.json").exists() and not all(
        (directory / name).exists() for name in ("vocab.json", "merges.txt")
    ):
        raise ValueError(
            f"{directory} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        )
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and jinja raise many kinds, all meaning: these files are no tokenizer
        raise ValueError(
            f"{directory} is not a readable tokenizer: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None


class Tokenizer:
    """Prompts in, text out. `positions` is how many LLM positions a clip of 30 s takes (300)."""

    def __init__(self, directory: Path, config: Omni2Config, positions: int):
        self.text = load(directory / "tokenizer")
        self.speech = load(directory / "tts_tokenizer") if config.speech_lm else None
        self.config = config
        self.positions = positions

    def prompt(self, turns: Sequence[str | int]) -> list[int]:
        """Turns in order, the user's first: how many clips of speech it has, or its text -> prompt ids, speech expanded.

        The same chat template as the released code (Qwen2.5's, with its default system line).
        """
        return self.expand(self.text.encode(self.render(turns), add_special_tokens=False))

    def continuation(self, clips: int, ended: bool) -> list[int]:
        """What follows an answer in the cache: its end token unless it is there (`ended`), and a spoken turn of so many clips."""
        marker = "\0"
        ids = self.text.encode(
            self.render([1, marker, clips]).split(marker, 1)[1], add_special_tokens=False
        )
        return self.expand(ids[1:] if ended else ids)

    def render(self, turns: Sequence[str | int]) -> str:
        content = [turn if isinstance(turn, str) else SPEECH_TEXT * turn for turn in turns]
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(content)
        ]
        return self.text.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def expand(self, ids: Sequence[int]) -> list[int]:
        """<speech> becomes as many SPEECH ids as a clip has features."""
        return [
            i
            for token in ids
            for i in ([SPEECH] * self.positions if token == self.config.tokens.speech else [token])
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.text.decode(list(ids), skip_special_tokens=True).strip()

    def unit_text(self, speech: Sequence[int]) -> str:
        """Speech-LM tokens as the string of the released answers, "<12><6560>..."."""
        return self.speech.decode(list(speech), skip_special_tokens=True)


def parse_units(text: str, units: int) -> list[int]:
    """Every number in the text that is a unit, as the released decoder script reads it."""
    return [unit for unit in map(int, re.findall(r"\d+", text)) if unit < units]

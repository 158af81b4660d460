"""The configuration of the whole model, and its file config.json."""

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from omni2_jax.config.parts import (
    SAMPLES_PER_FRAME,
    AdapterConfig,
    DecoderConfig,
    FlowConfig,
    HiftConfig,
    SpeakerConfig,
    SpeechEncoderConfig,
    TokenConfig,
)
from omni2_jax.config.ranges import STRICT, Count, Vocabulary, check_equal, require
from omni2_jax.files import atomic_write
from omni2_jax.validation import validated

LANGUAGE_PARTS = ("speech_encoder", "adapter", "llm", "fusion", "speech_lm")
DECODER_PARTS = ("flow", "vocoder", "speaker")
PARTS = LANGUAGE_PARTS + DECODER_PARTS  # in the order of the data's path

T = TypeVar("T")
if TYPE_CHECKING:
    # A part is `Optional`, but a type checker takes it as present: code that runs a part is called
    # for checkpoints that have it, and would otherwise have to test for None in every line.
    Part = Annotated[T, "or None"]
else:
    Part = Optional


@dataclass(frozen=True, config=STRICT)
class Omni2Config:
    """The whole model. A part that a checkpoint lacks is None."""

    llm: Part[DecoderConfig] = field(default_factory=DecoderConfig)
    speech_encoder: Part[SpeechEncoderConfig] = field(default_factory=SpeechEncoderConfig)
    adapter: Part[AdapterConfig] = field(default_factory=AdapterConfig)
    speech_lm: Part[DecoderConfig] = field(default_factory=lambda: DecoderConfig(vocabulary=158227))
    flow: Part[FlowConfig] = field(default_factory=FlowConfig)
    # With a second vocoder: Part[Annotated[HiftConfig | NewConfig, Field(discriminator="kind")]].
    vocoder: Part[HiftConfig] = field(default_factory=HiftConfig)
    speaker: Part[SpeakerConfig] = field(default_factory=SpeakerConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    # What the speech LM is given of a text token (fusion.py); "text": the token's embedding alone.
    mix: Literal["gate", "sum", "hidden", "text"] = "gate"
    # What is answered to a recording in which nobody speaks; "": whatever the model makes of it.
    no_speech_reply: Annotated[str, Field(max_length=1000)] = ""
    units: Vocabulary = 6561
    read: Count = 3  # R: text tokens read before each write
    write: Count = 10  # W: speech units written after each read
    # LLM positions of a conversation at most (tokenizer_model_max_length)
    max_prompt: Annotated[int, Field(ge=1, le=10_000_000)] = 4096

    def check(self) -> None:
        """Raise ValueError, one line, if settings of different parts do not fit one another.

        It runs when a configuration is loaded or saved: the converter replaces one part at a time.
        """
        self.check_tokens()
        if self.flow and self.vocoder:
            check_equal("vocoder.mels", self.vocoder.mels, "flow.mels", self.flow.mels)
        if self.flow and self.speaker:
            check_equal(
                "speaker.embedding", self.speaker.embedding, "flow.speaker", self.flow.speaker
            )
        if self.flow and self.speech_lm:
            check_equal("flow.units", self.flow.units, "units", self.units)

    def check_tokens(self) -> None:
        """Raise ValueError if a token lies outside the vocabulary it belongs to."""
        tokens = self.tokens
        if self.llm:
            require(
                max(tokens.text_eos) < self.llm.vocabulary,
                f"tokens.text_eos is {list(tokens.text_eos)},"
                f" expected ids below llm.vocabulary, which is {self.llm.vocabulary}",
            )
        if self.speech_lm:
            vocabulary = self.speech_lm.vocabulary
            require(
                tokens.sep + self.units < vocabulary,
                f"{self.units} units follow <sep>, which is {tokens.sep},"
                f" but the speech LM has only {vocabulary} tokens (speech_lm.vocabulary)",
            )
            require(
                tokens.unit_eos < vocabulary,
                f"tokens.unit_eos is {tokens.unit_eos},"
                f" expected an id below speech_lm.vocabulary, which is {vocabulary}",
            )

    @property
    def speech_positions(self) -> int:
        """LLM positions of one window of the speech encoder: 300 for the released 30 s.

        Raises ValueError without a speech encoder and an adapter.
        """
        if self.speech_encoder is None or self.adapter is None:
            raise ValueError(
                "speech_encoder or adapter is null, but the LLM's speech positions depend on both"
            )
        return self.speech_encoder.frames // self.adapter.stride

    @property
    def segment_samples(self) -> int:
        """Samples at 16 kHz in one window of the speech encoder, a segment: 480,000 for 30 s.

        0 without a speech encoder.
        """
        return SAMPLES_PER_FRAME * self.speech_encoder.frames if self.speech_encoder else 0

    def replace(self, **changes) -> "Omni2Config":
        """A copy with other fields. Raises ValueError if the result is not valid."""
        return dataclasses.replace(self, **changes)

    def only(self, *parts: str) -> "Omni2Config":
        """The same model with no other parts than these."""
        fields = [f.name for f in dataclasses.fields(self) if f.name in PARTS]
        return self.replace(**{name: None for name in fields if name not in parts})

    def need(self, path: Path, *parts: str) -> None:
        """Raise ValueError naming the file `path` if the settings of one of `parts` are null."""
        absent = [part for part in parts if getattr(self, part, True) is None]
        require(not absent, f"{path}: {', '.join(absent)} is null, expected the part's settings")

    def save(self, path: Path) -> None:
        """Write config.json, whole or not at all.

        Raises ValueError if the parts do not fit (`check`).
        """
        self.check()
        with atomic_write(path) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Omni2Config":
        """Read config.json. Raises ValueError, one line, with the file and every wrong setting."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(
                f"{path.parent} is not an omni2-jax checkpoint: it has no {path.name}"
            ) from None
        config = validated(cls, content, f"{path} is not an omni2-jax config", RENAMED)
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return config


RENAMED = {  # former names of settings in config.json
    "hift": "is called vocoder now; rename it, and the folder params/hift to params/vocoder",
    "model_type": "is a setting of Hugging Face's; convert its directory first (omni2 convert)",
}

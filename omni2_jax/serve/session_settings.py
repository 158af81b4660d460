"""The settings of a connection of the Realtime API; `session.update` changes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from omni2_jax.serve import events
from omni2_jax.serve.events import EventError

if TYPE_CHECKING:
    from omni2_jax.serve.server import Server

Modality = Literal["audio", "text"]


@dataclass(frozen=True)
class SessionSettings:
    """What holds for all responses of a connection that do not say otherwise.

    max_output_tokens, temperature: as the API writes them; the temperature None is the server's.
    """

    modality: Modality
    voice: str | None
    transcription: events.Transcription | None
    instructions: str | None = None
    max_output_tokens: events.MaxTokens = "inf"
    temperature: float | None = None
    input_format: str = "audio/pcm"
    output_format: str = "audio/pcm"
    turn_detection: events.ServerVad | None = field(default_factory=events.ServerVad)

    @classmethod
    def of(cls, server: "Server") -> "SessionSettings":
        """Those that a new connection begins with. Raises EventError without a voice to speak."""
        return cls(
            modality="audio" if server.speaks else "text",
            voice=server.voices.find(None),
            transcription=events.Transcription() if server.recogniser else None,
        )

    def changed(self, patch: events.SessionPatch, server: "Server") -> "SessionSettings":
        """The same with the fields that an event names.

        Raises EventError for a voice or a modality that the server does not have.
        """
        fields = {"instructions", "max_output_tokens", "temperature"}
        changes: dict[str, Any] = patch.model_dump(include=fields, exclude_unset=True)
        if patch.output_modalities:
            changes["modality"] = modality(patch.output_modalities, server)
        if patch.audio and (output := patch.audio.output):
            if output.voice:
                changes["voice"] = server.voices.find(output.voice)
            if output.format:
                changes["output_format"] = output.format.type
        if patch.audio and (audio := patch.audio.input):
            if audio.format:
                changes["input_format"] = audio.format.type
            for name in {"turn_detection", "transcription"} & audio.model_fields_set:
                changes[name] = getattr(audio, name)
        if not server.recogniser:  # clients ask for it by default; `session.updated` tells
            changes["transcription"] = None
        if "max_output_tokens" in changes:
            changes["max_output_tokens"] = changes["max_output_tokens"] or "inf"
        return replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The fields of the session as the API writes them."""
        detection, transcription = self.turn_detection, self.transcription
        return {
            "instructions": self.instructions or "",
            "output_modalities": [self.modality],
            "max_output_tokens": self.max_output_tokens,
            "audio": {
                "input": {
                    "format": events.describe_format(self.input_format),
                    "turn_detection": detection.model_dump() if detection else None,
                    # Some clients refuse a model that is null.
                    "transcription": transcription and transcription.model_dump(exclude_none=True),
                },
                "output": {
                    "format": events.describe_format(self.output_format),
                    "voice": self.voice,
                },
            },
        }


def modality(modalities: Sequence[str], server: "Server") -> Modality:
    """The modality of the answers, from the list of those that a client asks for.

    Raises EventError for audio of a model that does not speak.
    """
    if "audio" not in modalities:
        return "text"
    if not server.speaks:
        raise EventError("this model answers in text only", param="output_modalities")
    return "audio"

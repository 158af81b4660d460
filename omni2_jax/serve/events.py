"""Events of OpenAI's Realtime API: what a client may send, checked by pydantic.

Names and fields are those of the GA version. Fields that this server has no use for are ignored.
The older beta version differs in a few names; `from_beta` and `BETA_NAMES` translate.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from omni2_jax.serve import faults
from omni2_jax.serve.audio import FORMATS

MAX_INSTRUCTIONS = 16_384  # characters
MAX_TEXT = 16_384  # characters of a text turn
MAX_ID = 256  # characters of an id


class Fields(BaseModel):
    """The fields of an object that this server knows; others are ignored.

    A field that is null counts as absent: clients send null for what their users leave open.
    """

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Format(BaseModel):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int | None = None

    @model_validator(mode="after")
    def check_rate(self) -> Self:
        expected, _ = FORMATS[self.type]
        if self.rate not in (None, expected):
            raise ValueError(f"{self.type} has a rate of {expected} Hz here, not {self.rate}")
        return self


def describe_format(name: str) -> dict[str, Any]:
    """A format of FORMATS as the API writes it, which gives a rate for PCM only."""
    rate, encoding = FORMATS[name]
    return {"type": name} | ({"rate": rate} if encoding.startswith("PCM") else {})


class ServerVad(Fields):
    # This server has no semantic detector: it listens for silence in both cases.
    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5_000)
    silence_duration_ms: int = Field(default=500, ge=100, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True


def detect_alike(a: ServerVad | None, b: ServerVad | None) -> bool:
    """Whether two settings find the same turns; what happens at their ends may differ."""
    actions = {"type", "create_response", "interrupt_response"}
    return (a and a.model_dump(exclude=actions)) == (b and b.model_dump(exclude=actions))


class Transcription(BaseModel):
    model: str | None = None
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = None  # ISO 639


class AudioInput(BaseModel):
    format: Format | None = None
    turn_detection: ServerVad | None = (
        None  # null turns it off; so an absent one must be told apart
    )
    transcription: Transcription | None = None


class Voice(BaseModel):
    id: str = Field(max_length=MAX_ID)


class AudioOutput(BaseModel):
    format: Format | None = None
    voice: Annotated[str, Field(max_length=MAX_ID)] | Voice | None = None


class Audio(BaseModel):
    input: AudioInput | None = None
    output: AudioOutput | None = None


Modalities = list[Literal["text", "audio"]]
# The API's own bounds.
Metadata = dict[
    Annotated[str, Field(max_length=64)],
    Annotated[str, Field(max_length=512)],
]
MaxTokens = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"]


class SessionPatch(BaseModel):
    """The fields of a `session.update`; those that are absent stay as they are."""

    type: Literal["realtime"] = "realtime"
    instructions: str | None = Field(default=None, max_length=MAX_INSTRUCTIONS)
    output_modalities: Modalities | None = None
    audio: Audio | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)


class Content(BaseModel):
    type: Literal["input_text", "input_audio", "output_text", "output_audio", "text", "audio"]
    text: str | None = Field(default=None, max_length=MAX_TEXT)
    transcript: str | None = Field(default=None, max_length=MAX_TEXT)
    audio: str | None = None  # base64


class Item(BaseModel):
    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: list[Content] = Field(min_length=1, max_length=16)
    id: str | None = Field(default=None, max_length=MAX_ID)


class ResponsePatch(BaseModel):
    """The fields of a `response.create`, which hold for this response only."""

    conversation: Literal["auto"] | None = None
    input: list[Any] | None = None
    instructions: str | None = Field(default=None, max_length=MAX_INSTRUCTIONS)
    output_modalities: Modalities | None = None
    audio: Audio | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    metadata: Metadata | None = Field(default=None, max_length=16)


class Event(BaseModel):
    event_id: str | None = Field(default=None, max_length=MAX_ID)


class SessionUpdate(Event):
    type: Literal["session.update"]
    session: SessionPatch


class BufferAppend(Event):
    type: Literal["input_audio_buffer.append"]
    audio: str


class BufferCommit(Event):
    type: Literal["input_audio_buffer.commit"]


class BufferClear(Event):
    type: Literal["input_audio_buffer.clear"]


class ItemCreate(Event):
    type: Literal["conversation.item.create"]
    previous_item_id: str | None = Field(default=None, max_length=MAX_ID)
    item: Item


class ItemDelete(Event):
    type: Literal["conversation.item.delete"]
    item_id: str = Field(max_length=MAX_ID)


class ItemRetrieve(Event):
    type: Literal["conversation.item.retrieve"]
    item_id: str = Field(max_length=MAX_ID)


class ItemTruncate(Event):
    type: Literal["conversation.item.truncate"]
    item_id: str = Field(max_length=MAX_ID)
    content_index: Literal[0]
    audio_end_ms: int = Field(ge=0)


class ResponseCreate(Event):
    type: Literal["response.create"]
    response: ResponsePatch | None = None


class ResponseCancel(Event):
    type: Literal["response.cancel"]
    response_id: str | None = Field(default=None, max_length=MAX_ID)


ClientEvent = Annotated[
    SessionUpdate
    | BufferAppend
    | BufferCommit
    | BufferClear
    | ItemCreate
    | ItemDelete
    | ItemRetrieve
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel,
    Field(discriminator="type"),
]
CLIENT_EVENT: TypeAdapter[Any] = TypeAdapter(ClientEvent)


class EventError(ValueError):
    """A client's event that cannot be carried out; the connection goes on."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


def read(text: str | bytes) -> dict:
    """The JSON object that a client has sent. Raises EventError if it is none."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise EventError("the event is not JSON", "invalid_json") from None
    if not isinstance(message, dict):
        raise EventError("the event is not a JSON object", "invalid_json")
    return message


def id_of(message: dict) -> str | None:
    """The `event_id` that a client has given to a message, which errors refer to."""
    event_id = message.get("event_id")
    return event_id if isinstance(event_id, str) and len(event_id) <= MAX_ID else None


def parse(message: dict) -> Any:
    """The event of a client's message. Raises EventError with a clear line."""
    if isinstance(message.get("session"), dict):
        message = message | {"session": from_beta(message["session"])}
    if isinstance(message.get("response"), dict):
        message = message | {"response": from_beta(message["response"])}
    try:
        return CLIENT_EVENT.validate_python(message)
    except ValidationError as error:
        raise describe(error, message) from None


def describe(error: ValidationError, message: dict) -> EventError:
    """A fault of an event, in one line."""
    if error.errors()[0]["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = str(message.get("type"))[:MAX_ID]
        return EventError(f"unknown event type {kind!r}", "unknown_event", "type")
    param, wrong = faults.describe(error, message)
    return EventError(f"{param}: {wrong}", "invalid_value", param)


BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}

# The beta version's names of server events, where they differ.
BETA_NAMES = {
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "conversation.item.added": "conversation.item.created",
}


def from_beta(settings: dict) -> dict:
    """Settings of a session or response, with the beta version's flat fields moved to their place.

    modalities, voice, turn_detection, {input,output}_audio_format, max_response_output_tokens.
    """
    settings = dict(settings)
    audio: dict[str, dict] = {"input": {}, "output": {}}
    if isinstance(modalities := settings.pop("modalities", None), list):
        settings["output_modalities"] = ["audio"] if "audio" in modalities else modalities
    if "max_response_output_tokens" in settings:
        settings["max_output_tokens"] = settings.pop("max_response_output_tokens")
    if "voice" in settings:
        audio["output"]["voice"] = settings.pop("voice")
    if "turn_detection" in settings:
        audio["input"]["turn_detection"] = settings.pop("turn_detection")
    if "input_audio_transcription" in settings:
        audio["input"]["transcription"] = settings.pop("input_audio_transcription")
    for side in ("input", "output"):
        name = settings.pop(f"{side}_audio_format", None)
        if name is not None:
            audio[side]["format"] = {"type": BETA_FORMATS.get(str(name), str(name))}
    audio = {side: fields for side, fields in audio.items() if fields}
    return settings | {"audio": audio} if audio else settings


assert set(FORMATS) == set(BETA_FORMATS.values())

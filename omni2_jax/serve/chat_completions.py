"""/v1/chat/completions: a conversation in, its next answer out, as text and speech.

Spoken turns are content parts `input_audio`. With `modalities` ["text", "audio"] the answer is
spoken; with `stream` it comes as server-sent events while it is generated.
"""

import asyncio
import base64
import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from omni2_jax.generate.options import Options
from omni2_jax.generate.session import Question, Reply, Session
from omni2_jax.serve.answering import options_of
from omni2_jax.serve.audio import Encoder, decode_base64, decode_file, encode_file
from omni2_jax.serve.conversation import Conversation, Item, new_id
from omni2_jax.serve.events import MAX_ID, MAX_TEXT, EventError, Fields, Voice
from omni2_jax.serve.http import (
    AnswerStream,
    counted,
    failed_event,
    interrupting,
    read_json,
    sse,
    whole,
)
from omni2_jax.serve.server import Server
from omni2_jax.serve.worker import Answer

MAX_PARTS = 16  # of a message
SYSTEM = ("system", "developer")


class InputAudio(Fields):
    data: str  # base64 of a sound file, which tells its format itself


class Part(Fields):
    type: Literal["text", "input_audio"]
    text: str = Field(default="", max_length=MAX_TEXT)
    input_audio: InputAudio | None = None


class AudioReference(Fields):
    id: str = Field(max_length=MAX_ID)


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MAX_TEXT)]
        | Annotated[list[Part], Field(max_length=MAX_PARTS)]
        | None
    ) = None
    audio: AudioReference | None = None  # an earlier spoken answer

    @property
    def num_characters(self) -> int:
        if isinstance(self.content, list):
            return sum(len(part.text) for part in self.content)
        return len(self.content or "")

    @property
    def num_recordings(self) -> int:
        parts = self.content if isinstance(self.content, list) else ()
        return sum(part.type == "input_audio" for part in parts)


class AudioOutput(Fields):
    voice: Annotated[str, Field(max_length=MAX_ID)] | Voice | None = None
    format: Literal["wav", "flac", "mp3", "opus", "pcm16"] = "wav"


class StreamOptions(Fields):
    include_usage: bool = False


class Completion(Fields):
    messages: list[Message] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "audio"]] = Field(default=["text"])
    audio: AudioOutput = AudioOutput()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=1)
    stop: str | list[str] = ""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def is_spoken(self) -> bool:
        return "audio" in self.modalities


async def complete(server: Server, request: Request) -> Response:
    """Answer one request. Raises ValueError for a bad one."""
    completion = await read_json(server, request, Completion)
    if completion.is_spoken and not server.speaks:
        raise EventError("this model answers in text only", param="modalities")
    if completion.is_spoken and completion.stream and completion.audio.format != "pcm16":
        raise EventError("a streamed answer has audio.format pcm16", param="audio.format")
    if completion.stop:
        raise EventError("this server does not end answers at texts of the client", param="stop")
    session, question = await prepare(server, completion)
    with interrupting(server, session):
        answer = await server.worker.answer(session, question)
    if completion.stream:
        events = stream_events(server, completion, session, answer)
        return AnswerStream(server, session, events, "text/event-stream")
    replies = await whole(server, request, session, answer)
    return await whole_response(server, completion, session, replies)


async def prepare(server: Server, completion: Completion) -> tuple[Session, Question]:
    """A session that holds all messages but the last, and the last one's question."""
    characters = sum(message.num_characters for message in completion.messages)
    if characters > server.limits.characters:
        raise EventError(
            f"the messages have {characters} characters, expected at most "
            f"{server.limits.characters}",
            param="messages",
        )
    session = await server.worker.run(server.session, completion.audio.voice)
    conversation = Conversation(server.limits)
    for message in newest(completion.messages, server.worker.max_segments):
        role = "system" if message.role in SYSTEM else message.role
        item = Item(new_id("item"), role, await parts_of(server, message))
        conversation.items.append(item)
    session.instructions = conversation.instructions(None)
    question = conversation.question(session, conversation.items)
    options = choose_options(server.worker.options, completion)
    session.request = await server.worker.run(server.model.request, options)
    return session, question


def choose_options(base: Options, completion: Completion) -> Options:
    """The options of an answer: those of the request, and the server's where it states none."""
    limit = completion.max_completion_tokens or completion.max_tokens
    options = options_of(base, limit, completion.temperature, completion.is_spoken)
    top_p = options.top_p if completion.top_p is None else completion.top_p
    # The API's seeds have 64 bits and a sign, those of the model 32 bits.
    seed = options.seed if completion.seed is None else completion.seed % 2**32
    return dataclasses.replace(options, top_p=top_p, seed=seed)


def newest(messages: list[Message], recordings: int) -> list[Message]:
    """The messages without those before the newest `recordings` recordings, which no prompt holds.

    Those of the system stay. Raises EventError if the question alone has more recordings.
    """
    kept: list[Message] = []
    is_question = True  # whether no answer has come yet, from the end on
    for message in reversed(messages):
        recordings -= message.num_recordings
        is_question = is_question and message.role != "assistant"
        if is_question and recordings < 0:
            raise EventError("the question has too many recordings", param="messages")
        if recordings >= 0 or message.role in SYSTEM:
            kept.insert(0, message)
    return kept


async def parts_of(server: Server, message: Message) -> list:
    """The texts and speech features of a message."""
    if message.audio:
        return [server.answers.find(message.audio.id)]
    if message.content is None or isinstance(message.content, str):
        return [message.content or ""]
    parts: list = []
    for part in message.content:
        if part.type == "text":
            parts.append(part.text)
            continue
        if part.input_audio is None or message.role != "user":
            raise EventError("input_audio has `data` and is a part of the user's messages")
        try:
            data = decode_base64(part.input_audio.data)
            samples = await asyncio.to_thread(decode_file, data, server.limits.turn_seconds)
        except ValueError as error:
            raise EventError(server.public_message(error), param="messages") from None
        parts += await server.worker.hear(samples)
    return parts


async def whole_response(
    server: Server, completion: Completion, session: Session, replies: list[Reply]
) -> Response:
    """The whole answer in one JSON object."""
    text = "".join(reply.text for reply in replies)
    message: dict = {"role": "assistant", "content": text, "refusal": None}
    if completion.is_spoken:
        samples = np.concatenate([reply.samples for reply in replies])
        data = await asyncio.to_thread(encode, samples, completion.audio.format)
        answer_id = new_id("audio")
        server.answers.add(text, answer_id)
        audio = {"id": answer_id, "expires_at": server.answers.expiry()}
        audio |= {"data": base64.b64encode(data).decode(), "transcript": text}
        message |= {"content": None, "audio": audio}
    reason = await asyncio.to_thread(finish_reason, session, completion.is_spoken)
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    fields = {"choices": [choice], "usage": usage(session, completion.is_spoken, replies)}
    return JSONResponse(head(server, "chat.completion") | fields)


async def stream_events(
    server: Server, completion: Completion, session: Session, answer: Answer
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events: one for each reply, and those that end it."""
    start = head(server, "chat.completion.chunk")
    if completion.stream_options.include_usage:
        start["usage"] = None  # until the last chunk

    def event(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return sse(start | {"choices": [choice]})

    replies: list[Reply] = []
    encoder, answer_id = Encoder("audio/pcm"), new_id("audio")
    yield event({"role": "assistant", "content": ""})
    try:
        async for reply in counted(server, answer):
            replies.append(reply)
            if not completion.is_spoken:
                yield event({"content": reply.text})
                continue
            data = base64.b64encode(encoder(reply.samples)).decode()
            yield event({"audio": {"id": answer_id, "data": data, "transcript": reply.text}})
    except Exception as error:
        yield failed_event(server, error)
        return
    if completion.is_spoken:
        server.answers.add("".join(reply.text for reply in replies), answer_id)
        yield event({"audio": {"id": answer_id, "expires_at": server.answers.expiry()}})
    reason = await asyncio.to_thread(finish_reason, session, completion.is_spoken)
    yield event({}, reason)
    if completion.stream_options.include_usage:
        total = usage(session, completion.is_spoken, replies)
        yield sse(start | {"choices": [], "usage": total})
    yield "data: [DONE]\n\n"


def finish_reason(session: Session, is_spoken: bool) -> str:
    """Why the session's last answer ended: "length" if its text or its speech was cut, or "stop".

    This waits for the device.
    """
    if not session.has_ended(session.turns[-1]):
        return "length"
    if not is_spoken or session.prefix is None:
        return "stop"
    end = session.tokenizer.config.tokens.unit_eos
    return "stop" if int(session.prefix.last_speech_token[0]) == end else "length"


def encode(samples: np.ndarray, name: str) -> bytes:
    """Samples [N] at 24 kHz in one of the formats of an answer."""
    return Encoder("audio/pcm")(samples) if name == "pcm16" else encode_file(samples, name)


def head(server: Server, kind: str) -> dict:
    """The first fields of a completion or of one of its chunks."""
    created = int(time.time())
    return {"id": new_id("chatcmpl"), "object": kind, "created": created, "model": server.name}


def usage(session: Session, is_spoken: bool, replies: list[Reply]) -> dict:
    """The tokens of an answer; its units count if it is spoken."""
    tokens = sum(len(reply.text_tokens) for reply in replies)
    prompt = max(0, session.length - tokens)
    details = {}
    if is_spoken:
        audio = sum(len(reply.units) for reply in replies)
        tokens += audio
        details["completion_tokens_details"] = {"audio_tokens": audio}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        **details,
    }

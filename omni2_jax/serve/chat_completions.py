"""/v1/chat/completions: a conversation in, its next answer out, as text and speech.

Spoken turns are content parts `input_audio`. With `modalities` ["text", "audio"] the answer is
spoken; with `stream` it comes as server-sent events while it is generated.
"""

import asyncio
import base64
import io
import json
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import numpy as np
import soundfile
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from omni2_jax.audio import recordings
from omni2_jax.generate.session import Question, Reply, Session, Turn
from omni2_jax.serve.answering import options_of
from omni2_jax.serve.audio import Encoder, decode_base64
from omni2_jax.serve.conversation import new_id
from omni2_jax.serve.events import MAX_ID, MAX_TEXT, EventError, Voice
from omni2_jax.serve.server import FullError, Server
from omni2_jax.serve.worker import StoppedError

# Formats of a spoken answer: libsndfile's container and encoding. "pcm16" has no container.
CONTAINERS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}


class InputAudio(BaseModel):
    data: str
    format: str = Field(default="wav", max_length=16)


class Part(BaseModel):
    type: Literal["text", "input_audio"]
    text: str = Field(default="", max_length=MAX_TEXT)
    input_audio: InputAudio | None = None


class AudioReference(BaseModel):
    id: str = Field(max_length=MAX_ID)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_TEXT)] | list[Part] | None = None
    audio: AudioReference | None = None  # an earlier spoken answer


class AudioOutput(BaseModel):
    voice: Annotated[str, Field(max_length=MAX_ID)] | Voice | None = None
    format: Literal["wav", "flac", "mp3", "opus", "pcm16"] = "wav"


class Completion(BaseModel):
    """The fields of a request that this server knows; others are ignored."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "audio"]] = ["text"]
    audio: AudioOutput = AudioOutput()
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def is_spoken(self) -> bool:
        return "audio" in self.modalities


async def complete(server: Server, request: Request) -> Response:
    """Answer one request. Failures become the API's error objects."""
    try:
        with server.admit():
            completion = await read(server, request)
            session, question = await prepare(server, completion)
            if completion.stream:
                # The stream is admitted on its own: this block ends before it does.
                return stream_response(server, completion, session, question)
            return await whole_response(server, completion, session, question)
    except FullError as error:
        retry = {"Retry-After": str(server.limits.retry_seconds)}
        return failure(str(error), 429, "server_full", retry)
    except StoppedError as error:
        return failure(str(error), 503, "server_stopping")
    except ValueError as error:
        return failure(server.public_message(error), 400)
    except Exception as error:
        server.log_failure(error)
        return failure(server.public_message(error), 500)


def failure(
    message: str, status: int, code: str | None = None, headers: dict | None = None
) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


async def read(server: Server, request: Request) -> Completion:
    """The body of a request. Raises ValueError if it is too long or malformed."""
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > server.limits.body_bytes:
            raise EventError(f"the request has more than {server.limits.body_bytes} bytes")
    try:
        completion = Completion.model_validate_json(bytes(body))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise EventError(f"{place}: {fault['msg']}" if place else fault["msg"]) from None
    if completion.is_spoken and not server.speaks:
        raise EventError("this model answers in text only", param="modalities")
    if completion.is_spoken and completion.stream and completion.audio.format != "pcm16":
        raise EventError("a streamed answer has audio.format pcm16", param="audio.format")
    return completion


async def prepare(server: Server, completion: Completion) -> tuple[Session, Question]:
    """A session that holds all messages but the last, and the last one's question."""
    voice = completion.audio.voice
    name = server.voice_name(voice) if voice and server.speaks else None
    instructions, turns = [], []
    question: list = []
    session = await server.worker.run(server.worker.session, name)
    for message in completion.messages:
        parts = await parts_of(server, message)
        if message.role in ("system", "developer"):
            instructions += parts
        elif message.role == "user":
            question += parts
        else:
            if not question:
                raise EventError("an assistant's message must follow one of the user")
            turns.append(Turn(question, session.tokenizer.answer("".join(parts))))
            question = []
    if not question:
        raise EventError("the last message must be the user's")
    limit = completion.max_completion_tokens or completion.max_tokens
    options = options_of(server.worker.options, limit, completion.temperature, completion.is_spoken)
    session.instructions = "\n".join(instructions) or None
    session.turns = turns
    session.request = await server.worker.run(server.model.request, options)
    return session, question


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
        data = decode_base64(part.input_audio.data)
        samples = await asyncio.to_thread(decode_file, data, part.input_audio.format)
        parts += await server.worker.run(server.model.hear, samples)
    return parts


def decode_file(data: bytes, name: str) -> np.ndarray:
    """Samples at 16 kHz of a sound file. Raises ValueError if it cannot be decoded.

    name: its format. The bytes go through a temporary file that only this user can read.
    """
    suffix = f".{name}" if name.isalnum() else ""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        try:
            return np.concatenate(recordings.load_turn(file.name, "refuse"))
        except ValueError as error:
            raise EventError(str(error).replace(file.name, "the audio")) from None


async def whole_response(
    server: Server, completion: Completion, session: Session, question: Question
) -> Response:
    """The whole answer in one JSON object."""
    start = time.monotonic()
    replies: list[Reply] = []
    try:
        async for reply in await server.worker.answer(session, question):
            if not any(reply.samples.size for reply in replies) and reply.samples.size:
                server.metrics.first_audio.observe(time.monotonic() - start)
            replies.append(reply)
    except asyncio.CancelledError:
        server.start_task(server.worker.interrupt(session))
        raise
    text = "".join(reply.text for reply in replies)
    message: dict = {"role": "assistant", "content": text, "refusal": None}
    if completion.is_spoken:
        samples = np.concatenate([reply.samples for reply in replies])
        data = await asyncio.to_thread(encode_file, samples, completion.audio.format)
        audio = {"id": server.answers.add(text), "expires_at": server.answers.expiry()}
        audio |= {"data": base64.b64encode(data).decode(), "transcript": text}
        message |= {"content": None, "audio": audio}
    tokens = [token for reply in replies for token in reply.text_tokens]
    reason = "stop" if tokens and tokens[-1] in session.eos else "length"
    server.metrics.responses.labels("completed").inc()
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return JSONResponse(
        head(server, "chat.completion") | {"choices": [choice], "usage": usage(session, replies)}
    )


def stream_response(
    server: Server, completion: Completion, session: Session, question: Question
) -> Response:
    """The answer as server-sent events, one for each reply."""

    async def events() -> AsyncIterator[str]:
        start = head(server, "chat.completion.chunk")

        def event(delta: dict, reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps(start | {'choices': [choice]})}\n\n"

        tokens: list[int] = []
        text = ""
        encoder, answer_id = Encoder("audio/pcm"), server.answers.add("")
        try:
            with server.admit():
                yield event({"role": "assistant", "content": ""})
                async for reply in await server.worker.answer(session, question):
                    tokens += reply.text_tokens
                    text += reply.text
                    if not completion.is_spoken:
                        yield event({"content": reply.text})
                        continue
                    data = base64.b64encode(encoder(reply.samples)).decode()
                    audio = {"id": answer_id, "data": data, "transcript": reply.text}
                    yield event({"audio": audio})
            server.answers.add(text, answer_id)
            server.metrics.responses.labels("completed").inc()
            reason = "stop" if tokens and tokens[-1] in session.eos else "length"
            yield event({}, reason)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            server.start_task(server.worker.interrupt(session))
            raise
        except Exception as error:
            server.log_failure(error)
            fields = {"message": server.public_message(error), "type": "server_error"}
            yield f"data: {json.dumps({'error': fields})}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def head(server: Server, kind: str) -> dict:
    """The first fields of a completion or of one of its chunks."""
    created = int(time.time())
    return {"id": new_id("chatcmpl"), "object": kind, "created": created, "model": server.name}


def usage(session: Session, replies: list[Reply]) -> dict:
    text = sum(len(reply.text_tokens) for reply in replies)
    audio = sum(len(reply.units) for reply in replies)
    prompt = max(0, session.length - text)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + audio,
        "total_tokens": prompt + text + audio,
        "completion_tokens_details": {"audio_tokens": audio},
    }


def encode_file(samples: np.ndarray, name: str) -> bytes:
    """A sound file of samples at 24 kHz in one of the formats of an answer."""
    if name == "pcm16":
        return Encoder("audio/pcm")(samples)
    container, encoding = CONTAINERS[name]
    file = io.BytesIO()
    clipped = np.clip(samples, -1.0, 1.0)
    soundfile.write(file, clipped, recordings.OUTPUT_RATE, format=container, subtype=encoding)
    return file.getvalue()

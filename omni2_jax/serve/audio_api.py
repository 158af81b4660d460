"""/v1/audio: a text as speech, and the voices to speak with.

The text is the answer that the LLM is made to give, so that it sounds as the model's own answers.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from omni2_jax.generate.omni2 import REPEAT, SAID_NOTHING
from omni2_jax.generate.prompts import forced_ids
from omni2_jax.generate.session import Reply
from omni2_jax.serve.audio import CONTAINERS, Encoder, encode_file
from omni2_jax.serve.errors import failure
from omni2_jax.serve.events import MAX_ID, EventError, Fields, Voice
from omni2_jax.serve.http import (
    AnswerStream,
    body_of,
    counted,
    failed_event,
    interrupting,
    read_json,
    sse,
    whole,
)
from omni2_jax.serve.server import Server

PCM = "audio/pcm;rate=24000"
EVENTS = "text/event-stream"


class Speech(Fields):
    input: str = Field(min_length=1, max_length=4096)
    voice: Annotated[str, Field(max_length=MAX_ID)] | Voice | None = None
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: float = Field(default=1.0, ge=1.0, le=1.0)


async def speak(server: Server, request: Request) -> Response:
    """A text as speech. "pcm" is sent while it is generated, other formats when they are whole.

    stream_format "sse": as events, of which another format than pcm needs one for all of its audio.
    """
    speech = await read_json(server, request, Speech)
    if not server.speaks:
        raise EventError("this model answers in text only")
    session = await server.worker.run(server.session, speech.voice)
    limit = server.worker.options.max_new_tokens
    tokens = len(forced_ids(session.tokenizer, speech.input))
    if tokens > limit:
        raise EventError(
            f"the input has {tokens} tokens, this server says at most {limit} at once; "
            "send its paragraphs one by one",
            param="input",
        )
    question = [REPEAT.format(speech.input)]
    with interrupting(server, session):
        answer = await server.worker.answer(session, question, speech.input)
    is_sse = speech.stream_format == "sse"
    if speech.response_format == "pcm":
        replies = counted(server, answer)
        # An answer that fails before its first sample gets an error object.
        with interrupting(server, session):
            beginning = await until_sound(request, replies)
        if not beginning:
            return failure(SAID_NOTHING, 500)
        if is_sse:
            events = stream_events(server, beginning, replies, tokens)
            return AnswerStream(server, session, events, EVENTS)
        return AnswerStream(server, session, stream_pcm(beginning, replies), PCM)
    parts = await whole(server, request, session, answer)
    samples = np.concatenate([reply.samples for reply in parts])
    if not samples.size:
        return failure(SAID_NOTHING, 500)
    data = await asyncio.to_thread(encode_file, samples, speech.response_format)
    if is_sse:
        return Response(delta_event(data) + done_event(tokens, parts), media_type=EVENTS)
    return Response(data, media_type=CONTAINERS[speech.response_format][2])


async def until_sound(request: Request, replies: AsyncIterator[Reply]) -> list[Reply]:
    """The replies up to the first one with samples; [] if none has any.

    Raises ClientDisconnect if the client leaves before.
    """
    beginning = []
    async for reply in replies:
        beginning.append(reply)
        if reply.samples.size:
            return beginning
        if await request.is_disconnected():
            raise ClientDisconnect
    return []


async def stream_pcm(
    beginning: list[Reply], replies: AsyncIterator[Reply]
) -> AsyncGenerator[bytes, None]:
    """The samples as bytes. A failure ends the connection before the end of the body."""
    encoder = Encoder("audio/pcm")
    yield encoder(beginning[-1].samples)
    async for reply in replies:
        yield encoder(reply.samples)


async def stream_events(
    server: Server, beginning: list[Reply], replies: AsyncIterator[Reply], tokens: int
) -> AsyncGenerator[str, None]:
    """The samples as server-sent events. tokens: of the text."""
    encoder, said = Encoder("audio/pcm"), list(beginning)
    yield delta_event(encoder(beginning[-1].samples))
    try:
        async for reply in replies:
            said.append(reply)
            if reply.samples.size:
                yield delta_event(encoder(reply.samples))
    except Exception as error:
        yield failed_event(server, error)
        return
    yield done_event(tokens, said)


def delta_event(data: bytes) -> str:
    """The server-sent event of some audio."""
    return sse({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})


def done_event(tokens: int, replies: list[Reply]) -> str:
    """The server-sent event that ends the speech. tokens: of the text."""
    units = sum(len(reply.units) for reply in replies)
    usage = {"input_tokens": tokens, "output_tokens": units, "total_tokens": tokens + units}
    return sse({"type": "speech.audio.done", "usage": usage})


async def list_voices(server: Server, request: Request) -> Response:
    """All voices."""
    data = [server.voices.describe(name) for name in server.voices.names]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


async def add_voice(server: Server, request: Request) -> Response:
    """A new voice from a form with `name`, `consent` and the file `audio_sample`."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise EventError("a voice is sent as a form, multipart/form-data")
    body = body_of(request, server.limits.body_bytes)
    try:
        form = await MultiPartParser(request.headers, body, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise EventError(f"the form cannot be read: {error.message}") from None
    try:
        name, consent, sample = (form.get(key) for key in ("name", "consent", "audio_sample"))
        if not isinstance(name, str) or not isinstance(sample, UploadFile):
            raise EventError("the form has a text `name`, a text `consent`, a file `audio_sample`")
        recording = await sample.read()
        await server.voices.add(name, consent if isinstance(consent, str) else "", recording)
    finally:
        await form.close()
    return JSONResponse(server.voices.describe(name))


async def delete_voice(server: Server, request: Request) -> Response:
    """Delete a voice that a client has added."""
    name = request.path_params["name"]
    try:
        server.voices.delete(name)
    except EventError as error:
        return failure(str(error), 404, error.code)
    return JSONResponse({"id": name, "object": "audio.voice.deleted", "deleted": True})

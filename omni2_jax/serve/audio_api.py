"""/v1/audio: a text as speech, and the voices to speak with.

The text is the answer that the LLM is made to give, so that it sounds as the model's own answers.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from omni2_jax.generate.omni2 import REPEAT
from omni2_jax.generate.prompts import forced_ids
from omni2_jax.generate.session import Reply
from omni2_jax.serve.audio import CONTAINERS, Encoder, encode_file
from omni2_jax.serve.events import MAX_ID, EventError, Voice
from omni2_jax.serve.http import (
    AnswerStream,
    body_of,
    counted,
    failed_event,
    failure,
    read_json,
    sse,
    whole,
)
from omni2_jax.serve.server import Server

PCM = "audio/pcm;rate=24000"


class Speech(BaseModel):
    """The fields of a request that this server knows; others are ignored."""

    input: str = Field(min_length=1, max_length=4096)
    voice: Annotated[str, Field(max_length=MAX_ID)] | Voice | None = None
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: float = Field(default=1.0, ge=1.0, le=1.0)


async def speak(server: Server, request: Request) -> Response:
    """A text as speech. "pcm" is sent while it is generated, other formats when they are whole."""
    speech = await read_json(server, request, Speech)
    if not server.speaks:
        raise EventError("this model answers in text only")
    if speech.stream_format == "sse" and speech.response_format != "pcm":
        raise EventError("stream_format sse needs response_format pcm", param="response_format")
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
    answer = await server.worker.answer(session, question, speech.input)
    if speech.stream_format == "sse":
        events = stream_events(server, counted(server, answer))
        return AnswerStream(server, session, events, "text/event-stream")
    if speech.response_format == "pcm":
        replies = counted(server, answer)
        first = await anext(replies)  # an answer that fails at once gets an error object
        return AnswerStream(server, session, stream_pcm(first, replies), PCM)
    parts = await whole(server, request, session, answer)
    samples = np.concatenate([reply.samples for reply in parts])
    data = await asyncio.to_thread(encode_file, samples, speech.response_format)
    return Response(data, media_type=CONTAINERS[speech.response_format][2])


async def stream_pcm(first: Reply, replies: AsyncIterator[Reply]) -> AsyncGenerator[bytes, None]:
    """The samples as bytes. A failure ends the connection before the end of the body."""
    encoder = Encoder("audio/pcm")
    yield encoder(first.samples)
    async for reply in replies:
        yield encoder(reply.samples)


async def stream_events(server: Server, replies: AsyncIterator[Reply]) -> AsyncGenerator[str, None]:
    """The samples as server-sent events."""
    encoder, text, audio = Encoder("audio/pcm"), 0, 0
    try:
        async for reply in replies:
            text, audio = text + len(reply.text_tokens), audio + len(reply.units)
            if reply.samples.size:
                data = base64.b64encode(encoder(reply.samples)).decode()
                yield sse({"type": "speech.audio.delta", "audio": data})
    except Exception as error:
        yield failed_event(server, error)
        return
    usage = {"input_tokens": text, "output_tokens": audio, "total_tokens": text + audio}
    yield sse({"type": "speech.audio.done", "usage": usage})


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

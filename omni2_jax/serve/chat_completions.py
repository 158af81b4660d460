"""/v1/chat/completions: a conversation in, its next answer out, as text and speech.

Spoken turns are content parts `input_audio`. With `modalities` ["text", "audio"] the answer is
spoken; with `stream` it comes as server-sent events while it is generated.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from omni2_jax.generate.session import Question, Reply, Session, Turn
from omni2_jax.serve.answering import options_of
from omni2_jax.serve.audio import Encoder, decode_base64, decode_file, encode_file
from omni2_jax.serve.conversation import new_id
from omni2_jax.serve.events import MAX_ID, MAX_TEXT, EventError, Voice
from omni2_jax.serve.http import AnswerStream, counted, failed_event, read_json, sse, whole
from omni2_jax.serve.server import Server
from omni2_jax.serve.worker import Answer

MAX_PARTS = 16  # of a message
SYSTEM = ("system", "developer")


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
    """Answer one request. Raises ValueError for a bad one."""
    completion = await read_json(server, request, Completion)
    if completion.is_spoken and not server.speaks:
        raise EventError("this model answers in text only", param="modalities")
    if completion.is_spoken and completion.stream and completion.audio.format != "pcm16":
        raise EventError("a streamed answer has audio.format pcm16", param="audio.format")
    session, question = await prepare(server, completion)
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
    messages = newest(completion.messages, server.worker.max_segments)
    session = await server.worker.run(server.session, completion.audio.voice)
    instructions, turns = [], []
    question: list | None = None
    for message in messages:
        parts = await parts_of(server, message)
        if message.role in SYSTEM:
            instructions += parts
        elif message.role == "user":
            question = [*(question or ()), *parts]
        else:
            if question is None:
                raise EventError("an assistant's message must follow one of the user")
            turns.append(Turn(question, session.tokenizer.answer("".join(parts))))
            question = None
    # A question without parts is one in which no speech was heard.
    if question is None or not (question or server.model.config.no_speech_reply):
        raise EventError("the last message must be the user's")
    limit = completion.max_completion_tokens or completion.max_tokens
    options = options_of(server.worker.options, limit, completion.temperature, completion.is_spoken)
    session.instructions = "\n".join(instructions) or None
    session.turns = turns
    session.request = await server.worker.run(server.model.request, options)
    return session, question


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
    first = next((m for m in kept if m.role not in SYSTEM), None)
    if first is not None and first.role == "assistant" and len(kept) < len(messages):
        kept.remove(first)  # the answer to what was left out
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
        data = decode_base64(part.input_audio.data)
        samples = await asyncio.to_thread(decode_file, data, part.input_audio.format)
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
    reason = finish_reason(session, [token for reply in replies for token in reply.text_tokens])
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return JSONResponse(
        head(server, "chat.completion") | {"choices": [choice], "usage": usage(session, replies)}
    )


async def stream_events(
    server: Server, completion: Completion, session: Session, answer: Answer
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events, one for each reply."""
    start = head(server, "chat.completion.chunk")

    def event(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return sse(start | {"choices": [choice]})

    tokens: list[int] = []
    text = ""
    encoder, answer_id = Encoder("audio/pcm"), new_id("audio")
    yield event({"role": "assistant", "content": ""})
    try:
        async for reply in counted(server, answer):
            tokens += reply.text_tokens
            text += reply.text
            if not completion.is_spoken:
                yield event({"content": reply.text})
                continue
            data = base64.b64encode(encoder(reply.samples)).decode()
            yield event({"audio": {"id": answer_id, "data": data, "transcript": reply.text}})
    except Exception as error:
        yield failed_event(server, error)
        return
    if completion.is_spoken:
        server.answers.add(text, answer_id)
    yield event({}, finish_reason(session, tokens))
    yield "data: [DONE]\n\n"


def finish_reason(session: Session, tokens: list[int]) -> str:
    """Why an answer ended, by its text tokens: "stop", or "length" at the limit of tokens."""
    return "stop" if tokens and tokens[-1] in session.eos else "length"


def encode(samples: np.ndarray, name: str) -> bytes:
    """Samples [N] at 24 kHz in one of the formats of an answer."""
    return Encoder("audio/pcm")(samples) if name == "pcm16" else encode_file(samples, name)


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

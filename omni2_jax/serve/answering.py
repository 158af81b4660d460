"""One response of the Realtime API: the events from `response.created` to `response.done`."""

import asyncio
import base64
import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omni2_jax.generate.engine import GenerationError
from omni2_jax.generate.options import Options
from omni2_jax.generate.session import Reply
from omni2_jax.serve.audio import Encoder
from omni2_jax.serve.conversation import Item, new_id
from omni2_jax.serve.events import EventError, ResponsePatch
from omni2_jax.serve.listener import NO_SAMPLES

if TYPE_CHECKING:
    from omni2_jax.serve.realtime import Realtime


@dataclass
class Response:
    """A response that is being generated, or has ended."""

    item: Item
    asked: list[Item]  # the conversation that it answers; items that are added later are not
    modality: str  # "audio" or "text"
    encoder: Encoder
    metadata: dict[str, str] | None
    start: float  # time.monotonic() when the user's turn ended
    id: str = field(default_factory=lambda: new_id("resp"))
    status: str = "in_progress"
    reason: str | None = None  # why it was cancelled or is incomplete
    error: str | None = None
    has_item: bool = False  # whether its item has become part of the conversation
    tokens_sent: int = 0
    input_tokens: int = 0
    task: asyncio.Task | None = None

    def describe(self) -> dict:
        """The response as the API writes it."""
        details = None
        if self.status not in ("in_progress", "completed"):
            details = {"type": self.status, "reason": self.reason}
            if self.error:
                details = {
                    "type": self.status,
                    "error": {"type": "server_error", "message": self.error},
                }
        usage, is_over = None, self.status != "in_progress"
        if is_over:
            units = self.item.num_units if self.modality == "audio" else 0
            usage = {
                "total_tokens": self.input_tokens + self.tokens_sent + units,
                "input_tokens": self.input_tokens,
                "output_tokens": self.tokens_sent + units,
                "output_token_details": {"text_tokens": self.tokens_sent, "audio_tokens": units},
            }
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": self.status,
            "status_details": details,
            "output": [self.item.describe()] if self.has_item and is_over else [],
            "output_modalities": [self.modality],
            "metadata": self.metadata,
            "usage": usage,
        }

    def place(self) -> dict:
        """The ids that every event about the response's only content part has."""
        return {
            "response_id": self.id,
            "item_id": self.item.id,
            "output_index": 0,
            "content_index": 0,
        }


def options_of(
    base: Options, limit: int | None, temperature: float | None, spoken: bool
) -> Options:
    """The options of an answer: the client's limit of tokens and temperature, else the server's."""
    return dataclasses.replace(
        base,
        max_new_tokens=min(base.max_new_tokens, limit or base.max_new_tokens),
        temperature=base.temperature if temperature is None else temperature,
        # Without audio, nothing needs the units that are spoken after the end of the text.
        max_flush_units=base.max_flush_units if spoken else 1,
    )


async def respond(
    realtime: "Realtime", response: Response, patch: ResponsePatch, stopping: list[asyncio.Task]
) -> None:
    """Generate a response and send its events. Failures end it; they are sent, not raised.

    stopping: other responses of the conversation, whose end is waited for.
    """
    send = realtime.send
    await asyncio.gather(*stopping)
    send("response.created", response=response.describe())
    try:
        await generate(realtime, response, patch)
    except Exception as error:
        if not isinstance(error, EventError):
            realtime.server.log_failure(error)
        response.status, response.error = "failed", realtime.server.public_message(error)
        if is_of_question(error):
            for item in realtime.conversation.unanswered(response.asked):
                realtime.forget(item)
    else:
        response.status = "cancelled" if response.reason else "completed"
        if response.status == "completed" and not realtime.has_ended(response.item.answer):
            response.status, response.reason = "incomplete", "max_output_tokens"
    finish(realtime, response)


def is_of_question(error: Exception) -> bool:
    """Whether the question is at fault: every later answer would fail if it stayed."""
    if isinstance(error, EventError):
        return error.code == "question_too_long"
    return isinstance(error, ValueError | GenerationError)


async def generate(realtime: "Realtime", response: Response, patch: ResponsePatch) -> None:
    """Run the model and send what it says, until it ends or the response is cancelled."""
    send, item, place = realtime.send, response.item, response.place()
    question, last = await realtime.question(patch, response)
    if response.reason:  # the user may have gone on talking: the next answer is to both turns
        return
    previous = realtime.add_item(item, last)
    response.has_item = True
    item_fields = {"response_id": response.id, "output_index": 0, "item": item.describe()}
    send("response.output_item.added", **item_fields)
    send("conversation.item.added", previous_item_id=previous, item=item.describe())
    part = {"type": response.modality, "text" if response.modality == "text" else "transcript": ""}
    send("response.content_part.added", **place, part=part)
    answer = await realtime.worker.answer(realtime.session, question)
    if response.reason:  # it was cancelled before there was anything to interrupt
        await realtime.worker.interrupt(realtime.session)
    async for reply in answer:
        if not response.reason:
            deliver(realtime, response, reply)
    if response.reason:
        # The session keeps what was sent, not what was computed.
        await realtime.worker.run(realtime.session.truncate, response.tokens_sent)
    response.input_tokens = max(0, realtime.session.length - response.tokens_sent)


def deliver(realtime: "Realtime", response: Response, reply: Reply) -> None:
    """Send one reply."""
    send, item, place = realtime.send, response.item, response.place()
    item.answer = [*item.answer, *reply.text_tokens]
    response.tokens_sent = len(item.answer)
    item.num_units += len(reply.units)
    if reply.text:
        item.parts.append(reply.text)
        kind = "output_text" if response.modality == "text" else "output_audio_transcript"
        send(f"response.{kind}.delta", **place, delta=reply.text)
    if response.modality == "audio" and reply.samples.size:
        if not item.num_samples:
            realtime.server.metrics.first_audio.observe(time.monotonic() - response.start)
        item.num_samples += reply.samples.size
        send_audio(realtime, response, response.encoder(reply.samples))


def send_audio(realtime: "Realtime", response: Response, data: bytes) -> None:
    delta = base64.b64encode(data).decode()
    realtime.send("response.output_audio.delta", **response.place(), delta=delta)


def finish(realtime: "Realtime", response: Response) -> None:
    """Send the events that end a response."""
    send, item, place = realtime.send, response.item, response.place()
    item.status = "completed" if response.status == "completed" else "incomplete"
    if response.status == "failed":
        item.status = "failed"
    text = item.text
    if item in realtime.conversation.items:
        if response.modality == "audio":
            if item.num_samples and response.status != "cancelled":
                rest = response.encoder(NO_SAMPLES, last=True)
                if rest:
                    send_audio(realtime, response, rest)
            send("response.output_audio.done", **place)
            send("response.output_audio_transcript.done", **place, transcript=text)
            part = {"type": "audio", "transcript": text}
        else:
            send("response.output_text.done", **place, text=text)
            part = {"type": "text", "text": text}
        send("response.content_part.done", **place, part=part)
        item_fields = {"response_id": response.id, "output_index": 0, "item": item.describe()}
        send("response.output_item.done", **item_fields)
        index = realtime.conversation.items.index(item)
        previous = realtime.conversation.items[index - 1].id if index else None
        send("conversation.item.done", previous_item_id=previous, item=item.describe())
    realtime.server.metrics.responses.labels(response.status).inc()
    send("response.done", response=response.describe())

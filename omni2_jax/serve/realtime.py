"""A connection of the Realtime API: events of a client in, events of the server out.

Three kinds of tasks work for a connection: one reads and carries out the client's events in their
order, one sends, and one generates the response, if there is one.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from starlette.websockets import WebSocket

from omni2_jax.audio.recordings import INPUT_RATE, OUTPUT_RATE
from omni2_jax.serve import answering, events, session_settings, transcription
from omni2_jax.serve.answering import Response
from omni2_jax.serve.audio import Decoder, Encoder, decode, decode_base64
from omni2_jax.serve.connection import Connection
from omni2_jax.serve.conversation import Conversation, Item, new_id
from omni2_jax.serve.events import EventError
from omni2_jax.serve.listener import Listener
from omni2_jax.serve.session_settings import SessionSettings
from omni2_jax.serve.transcription import GrowingTranscript
from omni2_jax.serve.turn_detection import Change
from omni2_jax.serve.worker import StoppedError

if TYPE_CHECKING:
    from omni2_jax.serve.server import Server

MAX_RESPONSES = 4  # of one connection, all but one of which are being stopped


class Realtime(Connection):
    """One connection. `run` serves it until it ends."""

    def __init__(self, server: "Server", socket: WebSocket, is_beta: bool):
        super().__init__(socket, server.limits, is_beta)
        self.server, self.worker = server, server.worker
        self.id = new_id("sess")
        self.conversation = Conversation(server.limits)
        self.hearings: set[asyncio.Task] = set()
        # By the ids of their items: at most one is wanted, others are being stopped.
        self.responses: dict[str, Response] = {}
        self.settings = SessionSettings.of(server)
        self.listener = Listener(self.start_hearing, self.limits.turn_seconds, "audio/pcm")
        self.turn_id: str | None = None  # of the item that the speech will become
        self.growing = GrowingTranscript("")  # of this speech
        self.transcriptions = 0  # turns that wait for the recogniser
        self.handlers: dict[type, Callable] = {
            events.SessionUpdate: self.update_session,
            events.BufferAppend: self.append_audio,
            events.BufferCommit: self.commit_audio,
            events.BufferClear: self.clear_audio,
            events.ItemCreate: self.create_item,
            events.ItemDelete: self.delete_item,
            events.ItemRetrieve: self.retrieve_item,
            events.ItemTruncate: self.truncate_item,
            events.ResponseCreate: self.create_response,
            events.ResponseCancel: self.cancel_response,
        }

    # The connection.

    async def run(self) -> None:
        """Serve the connection until the client leaves or a limit is passed."""
        self.server.connections.add(self)
        session = None
        try:
            session = await self.worker.run(self.server.session, self.settings.voice)
            self.session = session
            self.voice = self.session.voice  # of responses that name none
            self.listener.detect_turns(self.settings.turn_detection)
            self.send("session.created", session=self.describe())
            async with asyncio.timeout(self.limits.session_seconds):
                await self.read_events()
        except TimeoutError:
            reason = "the session has reached its longest duration"
            self.send_error(EventError(reason, "session_expired"), None)
        except StoppedError as error:
            self.send_error(EventError(str(error), "server_stopping"), None)
        except EventError as error:  # there is no voice to speak with
            self.send_error(error, None)
        finally:
            self.server.connections.discard(self)
            self.stop_response("client_cancelled")
            await self.close()
            self.listener.close()
            if session:  # an answer that was about to begin has begun by now
                self.server.start_task(self.worker.interrupt(session))

    async def receive(self, text: str | bytes) -> None:
        """Carry out one event. A fault of the event is answered by an `error` event.

        The events of a client that sends turns faster than they can be heard wait.
        """
        await self.wait_for_hearings()
        event_id = None
        try:
            message = events.read(text)
            event_id = events.id_of(message)
            event = events.parse(message)
            await self.handlers[type(event)](event)
        except ValueError as error:
            self.report(error, event_id)
        except StoppedError:
            raise
        except Exception as error:  # a fault of the server; the connection goes on
            self.server.log_failure(error)
            self.report(error, event_id)

    async def wait_for_hearings(self) -> None:
        """Wait until the encoder has few enough turns of this client before it."""
        while len(self.hearings) > self.limits.hearings:
            await asyncio.wait(self.hearings, return_when=asyncio.FIRST_COMPLETED)

    def report(self, error: Exception, event_id: str | None) -> None:
        """Send the failure of an event as an `error` event."""
        self.server.metrics.errors.inc()
        if not isinstance(error, EventError):
            code = "invalid_value" if isinstance(error, ValueError) else "server_error"
            error = EventError(self.server.public_message(error), code)
        self.send_error(error, event_id)

    @property
    def is_busy(self) -> bool:
        """Whether a response is being generated, or events wait to be sent."""
        return bool(self.responses) or self.unsent_bytes > 0

    # Settings.

    def describe(self) -> dict:
        """The session as the API writes it."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.id,
            "model": self.server.name,
            "tools": [],
            "tool_choice": "none",
            **self.settings.describe(),
        }

    async def update_session(self, event: events.SessionUpdate) -> None:
        """Change the fields that an event names; either all of them or, after an error, none."""
        old, new = self.settings, self.settings.changed(event.session, self.server)
        if new.voice != old.voice:
            self.voice = await self.worker.run(self.server.voices.x_vector, new.voice)
        if new.input_format != old.input_format:
            self.listener.use_format(new.input_format)
        self.settings = new
        if not events.detect_alike(new.turn_detection, old.turn_detection):
            self.turn_id = None
            self.listener.detect_turns(new.turn_detection)
        self.send("session.updated", session=self.describe())

    # The user's audio.

    async def append_audio(self, event: events.BufferAppend) -> None:
        """Take audio in; with turn detection, act on the beginnings and ends of turns."""
        async for detection in self.listener.append(decode_base64(event.audio)):
            if detection.change is Change.STARTED:
                self.begin_turn(detection.sample)
                continue
            await self.wait_for_hearings()  # one event may have many turns
            try:
                self.end_turn(detection.sample)
            except EventError as error:  # of a full conversation; the audio goes on
                self.report(error, event.event_id)
        wanted = self.settings.transcription
        if self.turn_id and wanted and not self.server.is_transcribing:
            start, end = self.listener.start, self.listener.end
            if self.growing.needs(end - start):
                self.server.is_transcribing = True
                samples = self.listener.cut(start, end)
                transcript = transcription.of_beginning(
                    self, self.growing, samples, wanted.language
                )
                self.server.start_task(transcript)

    def begin_turn(self, sample: int) -> None:
        """The user has begun to speak: this interrupts the response, if that is wanted."""
        self.turn_id = new_id("item")
        self.growing = GrowingTranscript(self.turn_id)
        fields = {"audio_start_ms": sample * 1000 // INPUT_RATE, "item_id": self.turn_id}
        self.send("input_audio_buffer.speech_started", **fields)
        detection = self.settings.turn_detection
        if detection and detection.interrupt_response:
            self.stop_response("turn_detected")

    def end_turn(self, sample: int) -> None:
        """Make an item of the turn that ends before `sample`, and answer it if that is wanted."""
        fields = {"audio_end_ms": sample * 1000 // INPUT_RATE, "item_id": self.turn_id}
        self.send("input_audio_buffer.speech_stopped", **fields)
        self.add_spoken_item(*self.listener.commit(sample))
        detection = self.settings.turn_detection
        wanted = detection and detection.create_response and not self.active_response
        if wanted and len(self.responses) < MAX_RESPONSES:
            self.begin_response(events.ResponsePatch())

    def start_hearing(self, samples: np.ndarray) -> asyncio.Task:
        """The task that computes the speech features of samples [N] at 16 kHz."""
        task = self.start_task(self.worker.hear(samples))
        self.hearings.add(task)
        task.add_done_callback(self.end_hearing)
        return task

    def end_hearing(self, task: asyncio.Task) -> None:
        self.hearings.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio logs those that nobody asks for, and nobody may need it

    async def commit_audio(self, event: events.BufferCommit) -> None:
        """Make an item of all audio that was appended."""
        self.add_spoken_item(*self.listener.commit())

    def add_spoken_item(self, samples: np.ndarray, hearing: asyncio.Task) -> None:
        """Add a spoken turn to the conversation. hearing: computes its features."""
        item = Item(self.turn_id or new_id("item"), "user", [], is_audio=True, hearing=hearing)
        self.turn_id = None
        try:
            previous = self.add_item(item)
        except EventError:
            hearing.cancel()
            raise
        place = {"previous_item_id": previous}
        self.send("input_audio_buffer.committed", item_id=item.id, **place)
        self.send("conversation.item.added", item=item.describe(), **place)
        self.send("conversation.item.done", item=item.describe(), **place)
        if wanted := self.settings.transcription:
            self.start_task(transcription.of_turn(self, item, samples, wanted.language))

    async def clear_audio(self, event: events.BufferClear) -> None:
        """Forget all audio that is not part of an item."""
        self.turn_id = None
        self.listener.clear()
        self.send("input_audio_buffer.cleared")

    # Items.

    async def create_item(self, event: events.ItemCreate) -> None:
        """Insert a message that the client has written or recorded."""
        item = await self.item_of(event.item)
        previous = self.add_item(item, event.previous_item_id)
        self.send("conversation.item.added", previous_item_id=previous, item=item.describe())
        self.send("conversation.item.done", previous_item_id=previous, item=item.describe())

    def add_item(self, item: Item, previous: str | None = None) -> str | None:
        """Add an item to the conversation -> the id of the one before it. Raises EventError.

        The client is told which old items had to go.
        """
        before, removed = self.conversation.add(item, previous)
        self.conversation.forget_features(self.worker.max_segments)
        for old in removed:
            self.send("conversation.item.deleted", item_id=old.id)
        return before

    def forget(self, item: Item) -> None:
        """Remove an item that cannot be answered, if the client has not done so."""
        if item in self.conversation.items:
            self.conversation.delete(item.id)
            self.send("conversation.item.deleted", item_id=item.id)

    async def item_of(self, message: events.Item) -> Item:
        """A client's message as an item; speech in it is encoded from now on."""
        item = Item(message.id or new_id("item"), message.role, [])
        for content in message.content:
            if content.type == "input_audio":
                if message.role != "user" or not content.audio or len(message.content) > 1:
                    raise EventError(
                        "input_audio is the only part of a message of the user and has `audio`",
                        param="item.content",
                    )
                decoder = Decoder(self.settings.input_format)
                samples = await decode(decoder, decode_base64(content.audio), last=True)
                seconds = len(samples) / INPUT_RATE
                if seconds > self.limits.turn_seconds:
                    raise EventError(
                        f"the audio has {seconds:.1f} s, a turn at most "
                        f"{self.limits.turn_seconds:g} s",
                        param="item.content",
                    )
                item.is_audio, item.hearing = True, self.start_hearing(samples)
            else:
                item.parts.append(content.text or content.transcript or "")
                item.written += len(item.parts[-1])
        return item

    async def delete_item(self, event: events.ItemDelete) -> None:
        """Remove a message from the conversation."""
        if event.item_id in self.responses:
            raise EventError("the item is being generated", param="item_id")
        self.conversation.delete(event.item_id)
        self.send("conversation.item.deleted", item_id=event.item_id)

    async def retrieve_item(self, event: events.ItemRetrieve) -> None:
        """Send an item as the server knows it."""
        item = self.conversation.find(event.item_id, "retrieve")
        self.send("conversation.item.retrieved", item=item.describe())

    async def truncate_item(self, event: events.ItemTruncate) -> None:
        """Forget the end of an answer, which the user did not hear."""
        item = self.conversation.find(event.item_id, "truncate")
        if item.role != "assistant" or not item.is_audio:
            raise EventError("only a spoken answer can be truncated", param="item_id")
        if (response := self.responses.get(item.id)) and response.task:
            if response is self.active_response:
                self.stop_response("client_cancelled")
            await response.task
        tokens = item.tokens_heard(event.audio_end_ms)
        # The session forgets them when it is asked again, because it holds other tokens.
        last = item is self.conversation.items[-1] and self.session.turns
        if last and self.session.turns[-1].answer == item.answer:
            await self.worker.run(self.session.truncate, tokens)
        item.answer = item.answer[:tokens]
        item.parts = [self.session.tokenizer.decode(item.answer)]
        samples = min(item.num_samples, event.audio_end_ms * OUTPUT_RATE // 1000)
        item.num_units = item.num_units * samples // max(1, item.num_samples)
        item.num_samples = samples
        fields = {"item_id": item.id, "content_index": 0, "audio_end_ms": event.audio_end_ms}
        self.send("conversation.item.truncated", **fields)

    # Responses.

    @property
    def active_response(self) -> Response | None:
        """The response that is being generated and is wanted, if there is one."""
        wanted = (response for response in self.responses.values() if not response.reason)
        return next(wanted, None)

    async def create_response(self, event: events.ResponseCreate) -> None:
        """Answer the conversation. Raises EventError while another response is in progress."""
        if event.response and event.response.input:
            raise EventError("a response answers the conversation", param="response.input")
        if self.active_response or len(self.responses) >= MAX_RESPONSES:
            raise EventError(
                "the conversation has a response in progress; cancel it first",
                "conversation_already_has_active_response",
            )
        self.begin_response(event.response or events.ResponsePatch())

    def begin_response(self, patch: events.ResponsePatch) -> None:
        """Answer the conversation as soon as the responses that are being stopped have ended."""
        modality = self.settings.modality
        if patch.output_modalities:
            modality = session_settings.modality(patch.output_modalities, self.server)
        item = Item(new_id("item"), "assistant", [], modality == "audio", "in_progress")
        output = patch.audio and patch.audio.output
        chosen = output and output.format and output.format.type
        encoder = Encoder(chosen or self.settings.output_format)
        asked = list(self.conversation.items)
        response = Response(item, asked, modality, encoder, patch.metadata, time.monotonic())
        stopping = [other.task for other in self.responses.values() if other.task]
        self.responses[item.id] = response
        response.task = self.start_task(answering.respond(self, response, patch, stopping))
        response.task.add_done_callback(lambda _: self.responses.pop(item.id))

    async def question(
        self, patch: events.ResponsePatch, response: Response
    ) -> tuple[list, str | None]:
        """Prepare the session for a response -> the question, and where its answer belongs.

        It belongs behind the newest item that the response answers. Returned is the id of that
        item, or None if the client has deleted all of them.
        """
        for item in response.asked:
            if item.hearing:
                try:
                    item.parts = await item.hearing
                except Exception as error:
                    self.forget(item)
                    if not isinstance(error, ValueError):
                        raise
                    raise EventError(f"the user's audio cannot be used: {error}") from None
                item.hearing = None
        self.conversation.forget_features(self.worker.max_segments)
        limit = patch.max_output_tokens or self.settings.max_output_tokens
        temperature = patch.temperature
        options = answering.options_of(
            self.worker.options,
            None if limit == "inf" else limit,
            self.settings.temperature if temperature is None else temperature,
            response.modality == "audio",
        )
        instructions = patch.instructions or self.settings.instructions
        output = patch.audio and patch.audio.output
        name = self.server.voices.find(output.voice) if output and output.voice else None

        present = set(map(id, self.conversation.items))
        items = [item for item in response.asked if id(item) in present]

        def prepare() -> list:
            session = self.session
            session.voice = self.server.voices.x_vector(name) if name else self.voice
            session.request = self.worker.model.request(options)
            message = self.conversation.instructions(instructions)
            if message != session.instructions:
                session.instructions = message
                session.resume(session.turns)
            return self.conversation.question(session, items)

        question = await self.worker.run(prepare)
        left = [item.id for item in items if item in self.conversation.items]
        return question, left[-1] if left else None

    async def cancel_response(self, event: events.ResponseCancel) -> None:
        """Stop the response that is being generated."""
        active = self.active_response
        if not active or event.response_id not in (None, active.id):
            raise EventError("there is no response to cancel", "response_cancel_not_active")
        self.stop_response("client_cancelled")

    def stop_response(self, reason: str) -> None:
        """Send nothing more of the response, and stop the model at its next step."""
        response = self.active_response
        if response and not response.reason:
            response.reason = reason
            # The model must also be interrupted if the connection ends meanwhile.
            self.server.start_task(self.worker.interrupt(self.session))

    def has_ended(self, answer: list[int]) -> bool:
        """Whether an answer has its end token."""
        return bool(answer) and answer[-1] in self.session.eos

"""The thread that owns the model, and how coroutines talk to it.

All work on the model happens in one thread: it runs the engine's steps, and between two steps the
commands that coroutines have queued. Replies are handed to the event loop without waiting for it,
so that a slow client never delays a step.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.generate.options import Options
from omni2_jax.generate.session import Question, Reply, Session

T = TypeVar("T")
FAILED = "the server has failed and is shutting down"
PIECES = 1  # of newcomers' prompts, between two steps of those who speak


class StoppedError(RuntimeError):
    """The server is shutting down."""


class Answer:
    """An answer that is being generated, as the event loop sees it.

    Iterate over it once. It raises the error that ended the answer.
    """

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop):
        self.session, self.loop = session, loop
        self.replies: Iterator[Reply] | None = None  # set and used by the worker's thread
        # At most the replies of one answer; a limit of the request bounds them.
        self.queue: asyncio.Queue[Reply | Exception | None] = asyncio.Queue()

    def put(self, item: Reply | Exception | None) -> None:
        """Hand over a reply, an error, or None for the end. Called by the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it the client
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def deliver(self) -> bool:
        """Hand over what the engine has computed -> whether the answer has ended."""
        stream = self.session.stream
        if stream is None or self.replies is None:  # interrupted
            self.put(None)
            return True
        while stream.outputs or stream.done:
            try:
                self.put(next(self.replies))
            except StopIteration:
                self.put(None)
                return True
            except Exception as error:
                self.put(error)
                return True
        return False

    async def __aiter__(self) -> AsyncIterator[Reply]:
        while (item := await self.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class Worker:
    """Runs a model for many conversations. Call `start` first and `stop` at the end."""

    def __init__(self, model: Any, options: Options, slots: int, context: int):
        """model: an Omni2. options: the settings of all answers, which decide the engine's sizes.

        slots: how many answers are generated at the same time. context: LLM positions of a
        conversation before the newest answer; its oldest turns are dropped where it is longer.
        """
        self.model, self.options = model, options
        context = min(context, model.config.max_prompt)
        self.engine = model.engine(options, context, slots)
        self.max_segments = max(1, context // model.config.speech_positions)  # of a conversation
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Commands that make the device compute: at most one between two steps, so that newcomers
        # do not interrupt the speech of others.
        self.heavy: collections.deque[Callable[[], None]] = collections.deque()
        self.answers: list[Answer] = []
        self.stopping = False
        self.failure: BaseException | None = None  # what ended the thread before its time
        self.thread = threading.Thread(target=self.work, name="omni2-model", daemon=True)

    def start(self) -> None:
        """Compile all programs, then begin to work."""
        self.engine.warm_up()
        self.model.encode([np.zeros(INPUT_RATE, np.float32)])
        self.thread.start()

    def stop(self, seconds: float) -> bool:
        """Refuse new commands, finish the answers in at most `seconds` -> whether they finished."""
        self.stopping = True
        self.commands.put(None)
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def session(self, voice: jax.Array | None) -> Session:
        """A new conversation in the voice of an x-vector. The worker's thread must call this."""
        return Session(
            self.model.hear,
            self.engine,
            self.model.tokenizer,
            self.model.request(self.options),
            voice,
            overflow="drop",
        )

    async def run(self, function: Callable[..., T], *arguments, is_heavy: bool = False) -> T:
        """Call `function(*arguments)` in the worker's thread, between two steps.

        is_heavy: at most one such call between two steps. Raises the function's error, and
        StoppedError after `stop` or a failure of the thread.
        """
        if self.stopping:
            raise StoppedError("the server is shutting down")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.failure:
                    raise StoppedError(FAILED)
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self.commands.put((lambda: self.heavy.append(command)) if is_heavy else command)
        if self.failure:  # since the question above: nobody takes the command
            raise StoppedError(FAILED)
        return await asyncio.wrap_future(future)

    async def answer(self, session: Session, question: Question, say: str | None = None) -> Answer:
        """Begin to answer a turn of a conversation. Raises the errors of `Session.reply`."""
        answer = Answer(session, asyncio.get_running_loop())

        def begin() -> None:
            answer.replies = session.reply(question, say)
            self.answers.append(answer)

        await self.run(begin, is_heavy=True)
        return answer

    async def hear(self, samples: np.ndarray) -> list[jax.Array]:
        """The speech features of samples [N] at 16 kHz, [F, D] of every segment.

        Segments are encoded one by one, with steps of those who speak between them. Raises
        ValueError for bad audio.
        """
        segments = await asyncio.to_thread(self.model.segments, samples, "split")
        features = []
        for segment in segments:
            features += await self.run(self.model.encode, [segment], is_heavy=True)
        return features

    async def interrupt(self, session: Session) -> None:
        """Stop the answer of a conversation, if there is one."""
        await self.run(session.interrupt)

    def work(self) -> None:
        """The thread. If a step fails, as when a device is lost, nobody is left waiting."""
        try:
            self.work_until_stopped()
        except Exception as error:
            self.failure, self.stopping = error, True
            self.run_commands()  # they raise
            for command in self.heavy:
                command()
            for answer in self.answers:
                answer.put(StoppedError(FAILED))
            self.answers = []

    def work_until_stopped(self) -> None:
        """Commands first, then a step, then the delivery of what it computed; until `stop`."""
        while True:
            self.run_commands()
            if self.heavy:
                self.heavy.popleft()()
            if self.stopping and not (self.answers or self.heavy) and self.commands.empty():
                return
            if self.engine.waiting or self.engine.dispatched or not self.engine.is_idle:
                self.engine.step(PIECES)
            self.answers = [answer for answer in self.answers if not answer.deliver()]

    def run_commands(self) -> None:
        """Run the queued commands. If nothing is being answered, wait for one."""
        try:
            command = self.commands.get(block=not (self.answers or self.heavy or self.stopping))
            while True:
                if command is not None:
                    command()
                command = self.commands.get_nowait()
        except queue.Empty:
            pass

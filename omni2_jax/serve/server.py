"""The server's state: the model's worker, its clients, and what these may be told."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.generate.engine import GenerationError, QueueFullError
from omni2_jax.generate.options import Options
from omni2_jax.generate.session import Session
from omni2_jax.serve import capacity
from omni2_jax.serve.events import EventError, Voice
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.metrics import Metrics
from omni2_jax.serve.voices import Voices
from omni2_jax.serve.worker import StoppedError, Worker

if TYPE_CHECKING:
    from omni2_jax.serve.realtime import Realtime

log = logging.getLogger("omni2_jax.serve")
FAILED = "a request failed"  # how the log's line of a failure begins


class FullError(RuntimeError):
    """As many clients are connected as the server takes."""


class SpokenAnswers:
    """The texts of spoken answers, which later requests refer to by the audio's id."""

    SECONDS = 3600
    NUMBER = 256

    def __init__(self):
        # Each with the time.time() that it was kept at, the oldest first.
        self.texts: collections.OrderedDict[str, tuple[float, str]] = collections.OrderedDict()

    def add(self, text: str, answer_id: str) -> None:
        """Keep a text. The oldest ones are forgotten."""
        self.texts[answer_id] = (time.time(), text)
        while len(self.texts) > self.NUMBER:
            self.texts.popitem(last=False)

    def expiry(self) -> int:
        """Until when an answer can be referred to, in seconds since the epoch."""
        return int(time.time()) + self.SECONDS

    def find(self, answer_id: str) -> str:
        """The text of an answer. Raises EventError if it is not known (any more)."""
        kept, text = self.texts.get(answer_id, (0.0, ""))
        if time.time() - kept > self.SECONDS:
            raise EventError(f"there is no spoken answer {answer_id!r} (any more)")
        return text


class Server:
    """One model and its clients."""

    def __init__(
        self,
        model: Any,
        options: Options,
        limits: Limits,
        name: str = "omni2",
        recogniser: Any = None,
        voices: Path | None = None,
    ):
        """model: an Omni2. name: what /v1/models calls it.

        recogniser: a `recognisers.Recogniser` of what users say, if that is wanted.
        voices: where voices are kept that clients add; see `Voices`, also for the errors.
        """
        self.model, self.limits, self.name, self.recogniser = model, limits, name, recogniser
        self.worker = Worker(model, options, limits.sessions, limits.context)
        self.metrics, self.answers = Metrics(), SpokenAnswers()
        self.voices = Voices(model, voices, limits.voices)
        self.clients = 0
        self.is_transcribing = False  # a turn that is being spoken
        # Threads of its own: those of the event loop look for the turns of all clients.
        self.transcribers = ThreadPoolExecutor(recogniser.workers if recogniser else 1)
        self.tasks: set[asyncio.Task] = set()
        self.connections: set[Realtime] = set()
        self.speaks = model.config.flow is not None

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        options: Options,
        limits: Limits,
        measured: bool = False,
        decoder: bool = True,
        recogniser: str | None = None,
        voices: Path | None = None,
        mesh: Mesh | None = None,
    ) -> "Server":
        """Read a checkpoint -> its server, whose worker is not started yet.

        measured: as many sessions as speak in real time on this device, instead of those of
        `limits` (`capacity.most_sessions`). decoder: False answers in text only. recogniser: see
        `recognisers.open_recogniser`. voices: see `Voices`. mesh: see `Omni2.load`.
        Raises ValueError for a checkpoint, a recogniser or a folder of voices that cannot be used.
        """
        from omni2_jax.generate.omni2 import Omni2
        from omni2_jax.recognisers import open_recogniser

        transcriber = open_recogniser(recogniser) if recogniser else None
        model = Omni2.load(checkpoint, decoder=decoder, mesh=mesh)
        if measured:
            most = capacity.most_sessions(model, options, limits.context)
            limits = dataclasses.replace(limits, sessions=most)
        return cls(model, options, limits, checkpoint.name, transcriber, voices)

    def session(self, voice: str | Voice | None) -> Session:
        """A new conversation in a voice of this name. The worker's thread must call this.

        Raises EventError for an unknown voice.
        """
        return self.worker.session(self.voices.x_vector(self.voices.find(voice)))

    async def transcribe(self, samples: np.ndarray, language: str | None) -> str:
        """What the recogniser understands of samples [N] at 16 kHz. language: None is its own."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self.transcribers, self.recogniser.transcribe, samples, INPUT_RATE, language
        )

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Serve one client more. Raises FullError if the server takes no more now."""
        if self.clients >= self.limits.sessions:
            self.metrics.refused.inc()
            raise FullError(
                f"all sessions of this server ({self.limits.sessions}) are in use; "
                f"try again in {self.limits.retry_seconds} s"
            )
        self.clients += 1
        self.metrics.sessions.set(self.clients)
        try:
            yield
        finally:
            self.clients -= 1
            self.metrics.sessions.set(self.clients)

    async def drain(self, seconds: float, gives_up: Callable[[], bool]) -> None:
        """Stop the worker: answers in progress get so many seconds to finish, new ones fail.

        gives_up: whether to wait no longer.
        """
        deadline = time.monotonic() + seconds

        async def until(holds: Callable[[], bool]) -> None:
            while not (holds() or gives_up()) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)

        self.worker.stop(0.0)
        await until(lambda: not self.worker.thread.is_alive())
        await until(lambda: not any(connection.is_busy for connection in self.connections))
        for connection in self.connections:
            connection.send_error(
                EventError("the server is shutting down", "server_stopping"), None
            )
        await until(lambda: not any(connection.unsent_bytes for connection in self.connections))

    def start_task(self, coroutine) -> asyncio.Task:
        """Run a coroutine that no connection waits for."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.end_task)
        return task

    def end_task(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log_failure(task.exception())

    def log_failure(self, error: BaseException | None) -> None:
        """Log a failure in one line, without paths; clients get `public_message`."""
        if error and not isinstance(error, StoppedError | QueueFullError):
            kind, message = type(error).__name__, self.public_message(error)
            log.error("%s: %s: %s (%s)", FAILED, kind, message, places_of(error))

    def public_message(self, error: BaseException) -> str:
        """What a client may know of an error: never a path or a traceback."""
        if isinstance(error, StoppedError | QueueFullError | EventError | FullError):
            return str(error)
        if isinstance(error, GenerationError):
            return "the answer was stopped: the model's numbers were not finite"
        if isinstance(error, ValueError):
            text = str(error)
            return text if "/" not in text and "\\" not in text else "the request cannot be used"
        return "the server failed to answer"


def places_of(error: BaseException) -> str:
    """Where an error came from, the innermost call first: "engine.step:212 < worker.work:170"."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
    return " < ".join(f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in frames)

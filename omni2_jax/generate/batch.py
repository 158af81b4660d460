"""Answers to many conversations with one engine, in bounded memory.

A conversation is only encoded and submitted when a slot is free for it.
"""

import collections
from collections.abc import Callable, Iterator, Sequence

from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.generate.engine import Engine, ResponseStream
from omni2_jax.generate.session import Reply, replies


class Batch:
    """Conversations that wait for a free slot of an engine, and those that have one."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        submits: Sequence[Callable[[], ResponseStream]],
    ):
        """submits: for every conversation, the function that encodes and submits it."""
        self.engine, self.tokenizer = engine, tokenizer
        self.waiting = collections.deque(enumerate(submits))
        self.streams: dict[int, ResponseStream] = {}
        self.errors: dict[int, Exception] = {}

    def start(self) -> None:
        """Submit as many conversations as there are free slots.

        Raises the error of the first one that fails; then nothing stays submitted.
        """
        self.feed()
        if self.errors:
            for stream in self.streams.values():
                stream.cancel()
            raise self.errors[min(self.errors)]

    def feed(self) -> None:
        """Submit conversations while a slot is free. An error is kept for `replies`."""
        with self.engine.lock:
            self.engine.admit()  # requests of other users of the engine come first
            while self.waiting and None in self.engine.slots:
                index, submit = self.waiting.popleft()
                try:
                    self.streams[index] = submit()
                    self.engine.admit()
                except Exception as error:
                    self.errors[index] = error

    def replies(self, index: int) -> Iterator[Reply]:
        """The answer to one conversation. Meanwhile, the others in the slots are answered too.

        Raises the errors of encoding and submitting the conversation, and GenerationError.
        """
        while index not in self.streams and index not in self.errors:
            self.feed()
            if index not in self.streams and index not in self.errors:
                self.engine.step()
        if index in self.errors:
            raise self.errors.pop(index)
        stream = self.streams.pop(index)
        try:
            for reply in replies(stream, self.tokenizer, []):
                yield reply
                self.feed()
        finally:
            if not stream.done:
                stream.cancel()

"""A model behind an endpoint of chat completions with audio (OpenAI's protocol).

Any model that is served so becomes a row of the same tables. With a clock the answer is streamed,
and the time to its first audio is what the client sees, network included.
"""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import soundfile

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.endpoints import AnswerError, Client, Endpoint, audio_message
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.systems import SystemOptions
from omni2_jax.evaluate.systems.base import SpokenAnswer


class EndpointSystem:
    """See this file's description. Raises ValueError without the model's name or the key."""

    def __init__(self, url: str, options: SystemOptions):
        if not options.model:
            raise ValueError(f"{url} needs the name of a model: give --model")
        self.options = options
        self.client = Client(Endpoint(url, options.model, options.key_variable))
        self.workers = 1 if options.timed else options.batch

    def describe(self) -> dict[str, Any]:
        endpoint = self.client.endpoint
        return {
            "kind": "endpoint",
            "name": endpoint.model,
            "url": endpoint.url,
            "voice": self.options.voice,
            "max_tokens": self.options.options.max_new_tokens,
            "timed": self.options.timed,
        }

    def check(self, items: Sequence[Item]) -> None:
        """Raise an error if the server cannot be used, and ValueError for bad audio."""
        self.client.check()
        for item in items:
            try:
                for sound in item.turns[::2]:
                    recordings.load(sound)
            except ValueError as error:
                raise ValueError(f"{item.context}: {error}") from None

    def open(self) -> Callable[[Item], SpokenAnswer]:
        return self.answer

    def answer(self, item: Item) -> SpokenAnswer:
        messages = [message(turn) for turn in item.turns]
        begin = time.perf_counter()
        try:
            spoken = self.client.spoken(
                messages,
                voice=self.options.voice,
                max_tokens=self.options.options.max_new_tokens,
                stream=self.options.timed,
            )
            total = time.perf_counter() - begin
            with soundfile.SoundFile(io.BytesIO(spoken.audio)) as file:
                rate = file.samplerate
            content = recordings.SoundBytes(spoken.audio, "the answer")
            samples = recordings.load(content, rate)
        except (AnswerError, ValueError, soundfile.SoundFileError) as error:
            raise jobs.Refused("no answer", f"{item.context}: {error}") from None
        seconds = {"first_audio": spoken.seconds, "total": total} if self.options.timed else {}
        return SpokenAnswer(spoken.text.strip(), samples, rate, seconds)


def message(turn: Path | str) -> dict[str, Any]:
    """A turn as a message: a recording of the user's, or a reply of the model's."""
    if isinstance(turn, str):
        return {"role": "assistant", "content": turn}
    samples = recordings.load(turn)
    return audio_message(recordings.wav_bytes(samples, recordings.INPUT_RATE))

"""A server that speaks OpenAI's /audio/speech, as those of CosyVoice and fish-speech do."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.audio.recordings import SoundBytes
from omni2_jax.endpoints import AnswerError, Client, Endpoint, EndpointError
from omni2_jax.synthesize.engines.base import MAX_SECONDS, PROBE, EngineError
from omni2_jax.synthesize.voices import EngineEntry, Voice, expanded

PROBES = 8  # voices that are probed at the same time


class EndpointEngine:
    """Asks the server of `entry.endpoint`. name: the engine's name in the voices file."""

    def __init__(self, name: str, entry: EngineEntry):
        self.name, self.entry = name, entry
        self.endpoint = Endpoint(
            expanded(entry.endpoint), entry.model, entry.key_variable, entry.timeout
        )

    @functools.cached_property
    def client(self) -> Client:
        return Client(self.endpoint)

    def check(self, voices: Sequence[str]) -> None:
        """See `Engine`. Every voice is probed."""
        try:
            self.client.check()
            with ThreadPoolExecutor(PROBES) as pool:
                list(pool.map(self.probe, voices))
        except EndpointError as error:
            raise ValueError(f"engine {self.name}: {error}") from None

    def probe(self, voice: str) -> None:
        """Raise ValueError naming a voice that does not speak."""
        try:
            self.speak(PROBE, Voice(self.name, voice), 0, recordings.OUTPUT_RATE)
        except EngineError as error:
            raise ValueError(f"engine {self.name}, voice {voice!r}: {error}") from None

    def speak(self, text: str, voice: Voice, seed: int, rate: int) -> np.ndarray:
        """See `Engine`. The protocol knows no seed."""
        try:
            content = self.client.speech(text, voice.name, extra=dict(voice.settings))
            name = f"the answer of {self.endpoint.url}"
            return recordings.load(SoundBytes(content, name), rate, MAX_SECONDS)
        except (AnswerError, ValueError) as error:
            raise EngineError(str(error)) from None

    # A client cannot be sent to another process.

    def __getstate__(self) -> tuple[str, EngineEntry]:
        return self.name, self.entry

    def __setstate__(self, state: tuple[str, EngineEntry]) -> None:
        self.__init__(*state)

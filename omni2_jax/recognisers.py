"""Recognisers turn speech into text, so that spoken answers can be checked as text.

    recogniser = open_recogniser("faster-whisper-large-v3")
    recogniser.transcribe(samples, 24000)

The paper uses Whisper-large-v3 (section 4.2).
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omni2_jax import hub
from omni2_jax.audio import recordings
from omni2_jax.endpoints import Client, Endpoint
from omni2_jax.files import first_line, sha256

# A transcript repeats itself if zlib makes it smaller by more than this factor, which is Whisper's.
LOOP_COMPRESSION = 2.4
LOOP_TOKENS = 4  # so many tokens in a row may not come again when a recording is decoded once more
WHISPER_FILES = ("model.bin", "config.json", "tokenizer.json", "vocabulary.*", "preprocessor*.json")


class Recogniser(Protocol):
    """Speech to text. workers: recordings that it can hear at the same time."""

    workers: int

    def transcribe(self, samples: np.ndarray, rate: int, language: str | None = None) -> str:
        """The text of samples [N] in [-1, 1] at `rate` Hz; empty if nothing is heard.

        language: what is spoken, as "en"; None: the language that the recogniser was opened with.
        Raises ValueError if the recogniser fails.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides what is heard, for results.json."""
        ...


@dataclass
class WhisperRecogniser:
    """A Whisper model of faster-whisper (CTranslate2), decoded deterministically.

    Beam search at temperature 0, without the text of the window before, which makes errors go on.
    A transcript that repeats itself is decoded once more, and no four tokens in a row may then come
    twice. (Whisper itself would sample instead.) So the same samples give the same transcript.
    """

    source: str  # a directory with model.bin, or the id of a Hugging Face repository that holds it
    language: str = "en"
    beam_size: int = 5
    device: str = "cpu"  # cpu, cuda or auto
    compute_type: str = "int8"  # int8 or float32; on GPUs also float16
    threads: int = 0  # of the CPU; 0 = faster-whisper's choice
    directory: Path = field(init=False)
    model: Any = field(init=False, repr=False)
    workers: int = field(default=1, init=False)  # it uses all cores itself

    def __post_init__(self) -> None:
        from faster_whisper import WhisperModel

        directory = hub.local_path(self.source, hub.Source(WHISPER_FILES))
        assert directory is not None
        self.directory = directory
        if not (directory / "model.bin").exists():
            raise ValueError(
                f"{self.source} holds no model.bin; expected a Whisper model of faster-whisper"
            )
        try:
            self.model = WhisperModel(
                str(directory),
                device=self.device,
                compute_type=self.compute_type,
                cpu_threads=self.threads,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"cannot load {self.source}: {first_line(error)}") from None

    def transcribe(self, samples: np.ndarray, rate: int, language: str | None = None) -> str:
        heard = recordings.resample(samples, rate, recordings.INPUT_RATE)
        if not heard.size:
            return ""
        decode = functools.partial(
            self.model.transcribe,
            np.ascontiguousarray(heard, np.float32),
            language=language or self.language,
            beam_size=self.beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
        )
        segments = list(decode()[0])
        if any(segment.compression_ratio > LOOP_COMPRESSION for segment in segments):
            segments = decode(no_repeat_ngram_size=LOOP_TOKENS)[0]
        return "".join(segment.text for segment in segments).strip()

    @functools.cached_property
    def checksum(self) -> str:
        return sha256(self.directory / "model.bin")

    def describe(self) -> dict[str, Any]:
        import ctranslate2
        import faster_whisper

        return {
            "kind": "faster-whisper",
            "model": Path(self.source).name,
            "sha256": self.checksum,
            "language": self.language,
            "beam_size": self.beam_size,
            "compute_type": self.compute_type,
            "device": self.device,
            "temperature": 0,
            "loops": {"compression": LOOP_COMPRESSION, "tokens": LOOP_TOKENS},
            "versions": {
                "faster-whisper": faster_whisper.__version__,
                "ctranslate2": ctranslate2.__version__,
            },
        }


class EndpointRecogniser:
    """A recogniser behind /v1/audio/transcriptions (OpenAI's protocol), at temperature 0.

    Raises EndpointError if the server cannot be used.
    """

    workers = 8

    def __init__(self, endpoint: Endpoint, language: str):
        self.client, self.language = Client(endpoint), language
        self.client.check()

    def transcribe(self, samples: np.ndarray, rate: int, language: str | None = None) -> str:
        if not samples.size:
            return ""
        wav = recordings.wav_bytes(samples, rate)
        return self.client.transcribe(wav, language=language or self.language)

    def describe(self) -> dict[str, Any]:
        endpoint = self.client.endpoint
        return {
            "kind": "endpoint",
            "model": endpoint.model,
            "url": endpoint.url,
            "language": self.language,
            "temperature": 0,
        }


@dataclass(frozen=True)
class RecogniserOptions:
    """How a recogniser hears. beam_size, device, compute_type and threads are faster-whisper's;
    model and key_variable, the environment variable with the key, are an endpoint's.
    """

    language: str = "en"
    beam_size: int = 5
    device: str = "cpu"
    compute_type: str = "int8"
    threads: int = 0
    model: str = "whisper-1"
    key_variable: str = "OPENAI_API_KEY"


def open_recogniser(source: str, options: RecogniserOptions = RecogniserOptions()) -> Recogniser:
    """The recogniser that an option names.

    source: a directory or Hugging Face id of a Whisper model for faster-whisper, or a URL, as
    http://HOST/v1. Raises ValueError or EndpointError, one line, if it cannot be used.
    """
    if source.startswith(("http://", "https://")):
        endpoint = Endpoint(source, options.model, options.key_variable)
        return EndpointRecogniser(endpoint, options.language)
    return WhisperRecogniser(
        source,
        options.language,
        options.beam_size,
        options.device,
        options.compute_type,
        options.threads,
    )

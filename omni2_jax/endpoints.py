"""Servers that speak OpenAI's protocol: chat, speech, transcriptions, and chat with audio.

    client = Client(Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct"))
    client.check()                                        # before minutes are spent
    client.chat([{"role": "user", "content": "Hello."}])  # -> "Hello! How can I help you?"

The `openai` package sends the requests. It repeats those that meet a busy or broken server or a cut
connection, after the time that the server asks for, or after pauses that grow. Threads may share a
client.
"""

import base64
import io
import os
import time
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omni2_jax.files import first_line, short

T = TypeVar("T")

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
STREAM_RATE = 24000  # Hz
CHECK_SECONDS = 20  # that a server may take to say which models it has
ANSWERS = 3  # how often an answer is asked for that cannot be read or is empty
BUSY = (408, 409, 429, 502, 503, 504)  # statuses of a server that may answer later

Messages = Sequence[Mapping[str, Any]]


class EndpointError(RuntimeError):
    """The server cannot be used, now or at all. The message names it, and what is wrong."""


class AnswerError(ValueError):
    """The server is there, but gave no usable answer to this request, even when asked again."""


class TooLongError(AnswerError):
    """The answer was cut off at the number of tokens that was asked for. It is not asked again."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server.

    url: the base of its routes, usually ending in /v1. key_variable: the environment variable that
    holds the key; OPENAI_API_KEY may be unset, other ones may not. timeout: seconds for one answer.
    retries: how often a request is repeated that meets a busy server or none.
    """

    url: str
    model: str
    key_variable: str = DEFAULT_KEY_VARIABLE
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"{short(self.url)} is no endpoint; expected a URL such as http://HOST:PORT/v1"
            )

    def key(self) -> str:
        """The key. Raises ValueError if its variable is not set."""
        key = os.environ.get(self.key_variable, "")
        if not key and self.key_variable != DEFAULT_KEY_VARIABLE:
            raise ValueError(f"the environment variable {self.key_variable} holds no key")
        return key or "none"  # a server on one's own machine asks for none


@dataclass(frozen=True)
class SpokenAnswer:
    """An answer in text and speech. audio: a WAV file; seconds: until its first bytes came."""

    text: str
    audio: bytes
    seconds: float


class Client:
    """Asks one model. Every method raises EndpointError or AnswerError, one line.

    Raises ValueError if the key is missing, ModuleNotFoundError without the package `openai`.
    """

    def __init__(self, endpoint: Endpoint):
        import openai

        self.endpoint = endpoint
        self.openai: Any = openai.OpenAI(
            api_key=endpoint.key(),
            base_url=endpoint.url,
            timeout=endpoint.timeout,
            max_retries=endpoint.retries,
        )

    def check(self) -> None:
        """Find out whether the server is there, takes the key and has the model.

        A server that does not list its models passes. Raises EndpointError.
        """
        import openai

        client = self.openai.with_options(max_retries=1, timeout=CHECK_SECONDS)
        try:
            names = {model.id for model in client.models.list()}
        except (openai.NotFoundError, openai.UnprocessableEntityError):
            return
        except openai.APIStatusError as error:
            if error.status_code == 405:
                return
            raise self.failure(error) from None
        except openai.APIError as error:
            raise self.failure(error) from None
        except (ValueError, TypeError, AttributeError):
            return  # some answer with a list of their own kind
        if names and self.endpoint.model not in names:
            known = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise EndpointError(
                f"{self.endpoint.url} has no model {self.endpoint.model!r}; it has {known}"
            )

    def chat(
        self,
        messages: Messages,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
        json: bool = False,
    ) -> str:
        """The model's reply, without white space around it.

        messages: {"role", "content"} each. json: ask for a JSON object. Raises TooLongError if the
        reply was cut off at `max_tokens`.
        """
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        options |= {"seed": seed} if seed is not None else {}
        options |= {"response_format": {"type": "json_object"}} if json else {}

        def ask() -> str:
            answer = self.openai.chat.completions.create(
                model=self.endpoint.model, messages=list(messages), **options
            )
            choice = answer.choices[0]
            text = (choice.message.content or "").strip()
            if not text:
                raise AnswerError("the reply is empty")
            if choice.finish_reason == "length":
                raise TooLongError(f"the reply is longer than {max_tokens} tokens")
            return text

        return self.ask(ask)

    def speech(
        self, text: str, voice: str, *, format: str = "wav", extra: Mapping[str, Any] | None = None
    ) -> bytes:
        """`text` spoken: the content of a sound file. extra: more fields of the request."""

        def ask() -> bytes:
            answer = self.openai.audio.speech.create(
                model=self.endpoint.model,
                input=text,
                voice=voice,
                response_format=format,
                extra_body=dict(extra or {}),
            )
            content = answer.content
            if not content:
                raise AnswerError("the sound file is empty")
            if content.lstrip()[:1] == b"{":
                raise AnswerError(
                    f"expected a sound file, got {short(content.decode(errors='replace'))}"
                )
            return content

        return self.ask(ask)

    def transcribe(self, audio: bytes, *, language: str | None = "en", name: str = "a.wav") -> str:
        """What is said in a sound file; may be empty. name: its ending tells the format."""
        options = {"language": language} if language else {}

        def ask() -> str:
            file = io.BytesIO(audio)
            answer = self.openai.audio.transcriptions.create(
                model=self.endpoint.model, file=(name, file), temperature=0.0, **options
            )
            text = answer if isinstance(answer, str) else getattr(answer, "text", None)
            if not isinstance(text, str):
                raise AnswerError("the answer has no text")
            return text.strip()

        return self.ask(ask)

    def spoken(
        self,
        messages: Messages,
        *,
        voice: str | None = None,
        max_tokens: int = 512,
        stream: bool = False,
    ) -> SpokenAnswer:
        """The model's answer in text and speech. `audio_message` makes a message of a recording.

        stream: take the speech while it is generated, to know when it began.
        """
        audio = {"format": "pcm16" if stream else "wav"} | ({"voice": voice} if voice else {})

        def ask() -> SpokenAnswer:
            began = time.perf_counter()
            answer = self.openai.chat.completions.create(
                model=self.endpoint.model,
                messages=list(messages),
                max_tokens=max_tokens,
                modalities=["text", "audio"],
                audio=audio,
                stream=stream,
            )
            if stream:
                spoken = collect(answer, began)
            else:
                message = answer.choices[0].message
                content = base64.b64decode(message.audio.data if message.audio else "")
                text = message.content or (message.audio.transcript if message.audio else "")
                spoken = SpokenAnswer(text or "", content, time.perf_counter() - began)
            if not spoken.audio:
                raise AnswerError("the reply has no audio")
            return spoken

        return self.ask(ask)

    def ask(self, request: Callable[[], T]) -> T:
        """The result of a request, which is repeated if its answer cannot be read or is empty."""
        import openai

        fault = ""
        for _ in range(ANSWERS):
            try:
                return request()
            except TooLongError:
                raise
            except AnswerError as error:
                fault = str(error)
            except openai.APIStatusError as error:
                raise self.failure(error) from None
            except openai.APIConnectionError as error:
                raise self.failure(error) from None
            except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
                fault = f"the answer cannot be read: {first_line(error)}"
        raise AnswerError(f"{self.endpoint.url}, model {self.endpoint.model}: {fault}")

    def failure(self, error: Any) -> EndpointError | AnswerError:
        """What a failed request means. error: an `openai.APIError`."""
        import openai

        where, model = self.endpoint.url, self.endpoint.model
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{where} does not answer within {self.endpoint.timeout:g} s")
        status = getattr(error, "status_code", None)
        if status is None:
            cause = first_line(error.__cause__ or error)
            return EndpointError(f"{where} cannot be reached: {cause}; is the server running?")
        said = f"({status}: {first_line(error)[:200]})"
        if status in (401, 403):
            return EndpointError(f"{where} refuses the key in {self.endpoint.key_variable} {said}")
        if status == 404:
            return EndpointError(f"{where} has no model {model!r}, or not this route {said}")
        if status in BUSY:
            return EndpointError(
                f"{where} is busy, after {self.endpoint.retries} repetitions still {said}"
            )
        return AnswerError(f"{where}, model {model}: the request failed {said}")


def collect(answer: Iterable[Any], began: float) -> SpokenAnswer:
    """A streamed answer. began: when it was asked for, by `time.perf_counter`."""
    text, samples, seconds = "", b"", 0.0
    for part in answer:
        choices = part.to_dict().get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        audio = delta.get("audio") or {}
        text += delta.get("content") or audio.get("transcript") or ""
        if audio.get("data"):
            seconds = seconds or time.perf_counter() - began
            samples += base64.b64decode(audio["data"])
    return SpokenAnswer(text, wav(samples) if samples else b"", seconds)


def wav(samples: bytes) -> bytes:
    """The WAV file of a stream: 16 bits, one channel, 24 kHz by OpenAI's protocol."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(STREAM_RATE)
        file.writeframes(samples)
    return content.getvalue()


def audio_message(audio: bytes, format: str = "wav") -> dict[str, Any]:
    """A user's message that is a recording: the content of a sound file."""
    data = base64.b64encode(audio).decode()
    return {
        "role": "user",
        "content": [{"type": "input_audio", "input_audio": {"data": data, "format": format}}],
    }

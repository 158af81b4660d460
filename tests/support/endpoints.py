"""A stand-in for servers that speak OpenAI's protocol, with faults on demand.

It answers what it is told to, or something that follows from the request alone. Chat with audio and
/audio/speech answer a tone whose length grows with the text; /audio/transcriptions knows the texts
of these tones again.
"""

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import soundfile

CHAT, SPEECH, TRANSCRIPTIONS = "/chat/completions", "/audio/speech", "/audio/transcriptions"
RATE = 24000


def default_reply(messages: list[Mapping[str, Any]]) -> str:
    return f"Reply {len(messages)} to {digest(json.dumps(messages).encode())[:6]}."


@dataclass
class Standin:
    """What the server does, and what it was asked.

    reply: messages of a chat -> the text. models: what it lists; None: it has no such route.
    key: the key that it asks for. faults: by route, one for each request, used up in this order:

        "429"        busy, with Retry-After         "cut"        the connection ends in the middle
        "500"        fails                          "malformed"  an answer that is no JSON
        "empty"      an answer without content      "slow"       `slow_seconds` late
        "long"       cut off at the token limit     a number     another status
        None         no fault

    always: a fault for each request of a route. requests: route and body of all.
    """

    reply: Callable[[list[Mapping[str, Any]]], str] = default_reply
    models: tuple[str, ...] | None = ("standin",)
    key: str | None = None
    faults: dict[str, list[str | None]] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    slow_seconds: float = 1.0
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # digest of a sound file -> its text
    transcript: str = "Something else."  # of a recording that it did not make
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, route: str) -> int:
        """How many requests of a route there were."""
        return sum(asked == route for asked, _ in self.requests)

    def next_fault(self, route: str) -> str | None:
        with self.lock:
            waiting = self.faults.get(route)
            return waiting.pop(0) if waiting else self.always.get(route)

    def tone(self, text: str) -> bytes:
        """A WAV file that stands for a text: 60 ms for each letter, at least half a second."""
        samples = np.arange(int(RATE * max(0.5, 0.06 * len(text))))
        pitch = 100 + int(digest(text.encode()), 16) % 200
        file = io.BytesIO()
        wave = 0.3 * np.sin(2 * np.pi * pitch * samples / RATE)
        soundfile.write(file, wave, RATE, format="WAV", subtype="PCM_16")
        content = file.getvalue()
        self.texts[digest(content)] = text
        return content


class Handler(BaseHTTPRequestHandler):
    """The routes. Every answer says how long it is, so that a cut one is noticed."""

    standin: Standin
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.refused_key():
            return
        if self.path != "/v1/models" or self.standin.models is None:
            return self.fail(404, "there is no such route")
        models = [{"id": name, "object": "model"} for name in self.standin.models]
        self.send_json({"object": "list", "data": models})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = self.path.removeprefix("/v1")
        request = self.parsed(body)
        self.standin.requests.append((route, request))
        if self.refused_key():
            return
        fault = self.standin.next_fault(route)
        if fault == "slow":
            time.sleep(self.standin.slow_seconds)
        elif fault == "cut":
            return self.cut()
        elif fault == "malformed":
            return self.send(b'{"choices": [{"mess', "application/json")
        elif fault is not None and fault.isdigit():
            return self.fail(int(fault), "the stand-in was told to fail")
        models = self.standin.models
        if models is not None and request.get("model") not in models:
            return self.fail(404, f"the model {request.get('model')!r} does not exist")
        answers = {CHAT: self.chat, SPEECH: self.speech, TRANSCRIPTIONS: self.transcription}
        if route not in answers:
            return self.fail(404, "there is no such route")
        answers[route](request, fault)

    def parsed(self, body: bytes) -> dict[str, Any]:
        """The fields of a request; of a form, a file is its bytes."""
        kind = self.headers.get("Content-Type", "")
        if not kind.startswith("multipart/"):
            return json.loads(body)
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        fields: dict[str, Any] = {}
        for part in form.iter_parts():
            content = part.get_payload(decode=True)
            name = part.get_param("name", header="content-disposition")
            fields[str(name)] = content if part.get_filename() else bytes(content).decode()
        return fields

    def chat(self, request: dict[str, Any], fault: str | None) -> None:
        text = "" if fault == "empty" else self.standin.reply(request["messages"])
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if request.get("stream"):
            return self.stream(text)
        if "audio" in request.get("modalities", []):
            audio = b"" if fault == "empty" else self.standin.tone(text)
            data = base64.b64encode(audio).decode()
            message |= {
                "content": None,
                "audio": {"id": "a", "data": data, "transcript": text, "expires_at": 0},
            }
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "length" if fault == "long" else "stop",
        }
        self.send_json(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 0,
                "model": "standin",
                "choices": [choice],
            }
        )

    def stream(self, text: str) -> None:
        """A text and its tone in two parts of each, as events."""
        samples = self.standin.tone(text)[44:] if text else b""
        half = len(samples) // 4 * 2
        events = b""
        for part, sound in ((text[:3], samples[:half]), (text[3:], samples[half:])):
            audio = {"transcript": part, "data": base64.b64encode(sound).decode()}
            choice = {"index": 0, "delta": {"audio": audio}, "finish_reason": None}
            events += b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"
        self.send(events + b"data: [DONE]\n\n", "text/event-stream")

    def speech(self, request: dict[str, Any], fault: str | None) -> None:
        audio = b"" if fault == "empty" else self.standin.tone(request["input"])
        self.send(audio, "audio/wav")

    def transcription(self, request: dict[str, Any], fault: str | None) -> None:
        text = self.standin.texts.get(digest(request["file"]), self.standin.transcript)
        self.send_json({"text": "" if fault == "empty" else text})

    def refused_key(self) -> bool:
        key = self.standin.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.fail(401, "the key is wrong")
        return True

    def fail(self, status: int, message: str) -> None:
        self.send(json.dumps({"error": {"message": message}}).encode(), "application/json", status)

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), "application/json")

    def send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status >= 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(content)

    def cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"id": ')
        self.wfile.flush()
        self.close_connection = True


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serve(**settings: Any) -> Iterator[Standin]:
    """A stand-in on a free port of this machine; `url` is the endpoint's. settings: its fields."""
    standin = Standin(**settings)
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("StandinHandler", (Handler,), {"standin": standin})
    )
    standin.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()

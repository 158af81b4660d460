"""Bounds on everything that a client can make the server keep or compute."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a client may use. Where a bound is passed, the client gets a clear error."""

    sessions: int = 4  # realtime connections and HTTP requests that compute, at the same time
    event_bytes: int = 21 * 2**20  # of one event; the API allows 15 MiB of audio, 20 as base64
    turn_seconds: float = 30.0  # of speech in one turn; the server ends a longer one
    idle_seconds: float = 300.0  # without an event of the client, the connection is closed
    session_seconds: float = 3600.0  # the longest connection, as in OpenAI's API
    request_seconds: float = 300.0  # an HTTP request, and as long again to read its response
    unsent_bytes: int = 32 * 2**20  # events that wait because the client does not read
    context: int = 4096  # LLM positions of a conversation; older turns are forgotten
    body_bytes: int = 32 * 2**20  # of one HTTP request
    items: int = 512  # of a conversation
    characters: int = 2**16  # that a client writes in a conversation
    hearings: int = 2  # turns of one connection that wait for the speech encoder
    transcriptions: int = 8  # turns of one connection that wait for the recogniser
    voices: int = 64  # voices that clients have added
    retry_seconds: int = 5  # what a refused client is told to wait

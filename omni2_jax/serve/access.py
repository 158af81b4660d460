"""Who may use the server: API keys, and the origins of web pages."""

import hmac
import ipaddress
import logging
import re
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from omni2_jax.serve.errors import failure

# Paths that need a key. The page is open: it can do nothing without the API; and load balancers
# ask /healthz without a key.
GUARDED = ("/v1/", "/metrics")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
UNKNOWN_NAME = "the server does not answer to this name: add it with --origin, or use API keys"
OPEN_TO_OTHERS = "without API keys, the server answers this machine only (give it a key file)"
POLICY_VIOLATION = 1008  # WebSocket close code
KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser, which cannot set headers, sends a key

log = logging.getLogger("omni2_jax.serve")


def host_of(address: str) -> str:
    """The host in "host:port", without the brackets of IPv6; "" where there is none."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def is_loopback(scope: Scope) -> bool:
    """Whether a request came in at an address that only this machine reaches."""
    try:
        return ipaddress.ip_address((scope.get("server") or ("",))[0]).is_loopback
    except ValueError:
        return False


class Access:
    """ASGI middleware that refuses requests without a key, and pages of foreign origins.

    keys: () needs no key; the server must then be asked at a loopback address, whatever it listens
    on, and by a name of this machine or of `origins`: a web page whose own name leads to this
    machine (DNS rebinding) has no foreign origin.
    origins: those of pages that may use the server, as "https://example.org"; pages that the server
    itself has sent always may.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], origins: tuple[str, ...]):
        self.app, self.origins = app, origins
        self.hosts = {*LOOPBACK, *(host_of(origin.partition("://")[2]) for origin in origins)}
        self.keys = tuple(key.encode() for key in keys)
        self.has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # Behind a prefix, as that of a route of Ray Serve, the application looks at the rest.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_guarded = path.startswith(GUARDED)
        if not self.is_allowed_origin(headers):
            await self.refuse(scope, receive, send, 403, "this origin may not use the server")
        elif is_guarded and not self.has_key(headers):
            await self.refuse(scope, receive, send, 401, "an API key is missing or wrong")
        elif is_guarded and not self.keys and not is_loopback(scope):
            self.warn()
            await self.refuse(scope, receive, send, 403, OPEN_TO_OTHERS)
        elif is_guarded and not self.keys and host_of(headers.get("host", "")) not in self.hosts:
            await self.refuse(scope, receive, send, 403, UNKNOWN_NAME)
        else:
            await self.app(scope, receive, send)

    def is_allowed_origin(self, headers: Headers) -> bool:
        """Whether the page may use the server; without this, any page could use a local one."""
        origin = headers.get("origin")
        if origin is None or origin in self.origins:
            return True
        return origin.partition("://")[2] == headers.get("host")

    def has_key(self, headers: Headers) -> bool:
        """Whether the request has one of the keys; compared in constant time."""
        if not self.keys:
            return True
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        for name in headers.get("sec-websocket-protocol", "").split(","):
            if name.strip().startswith(KEY_PROTOCOL):
                given = name.strip().removeprefix(KEY_PROTOCOL)
        matches = [hmac.compare_digest(given.encode(), key) for key in self.keys]
        return any(matches)

    def warn(self) -> None:
        """Tell the operator, once, why clients are refused."""
        if not self.has_warned:
            log.warning("a request from outside was refused: %s", OPEN_TO_OTHERS)
        self.has_warned = True

    async def refuse(
        self, scope: Scope, receive: Receive, send: Send, status: int, message: str
    ) -> None:
        """Answer with an error in the API's form; a WebSocket is closed before it opens."""
        if scope["type"] == "websocket":
            await WebSocketClose(POLICY_VIOLATION, message)(scope, receive, send)
            return
        await failure(message, status)(scope, receive, send)


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys of a file, one a line.

    Raises ValueError if there is none, or one of other characters than a client can send in every
    way: in a header, as the name of a WebSocket's protocol, and behind the # of the page's address.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[A-Za-z0-9._~-]*", line):
            raise ValueError(
                f"{path}: the key of line {number} has characters other than A-Z a-z 0-9 . _ ~ -"
            )
    keys = tuple(filter(None, lines))
    if not keys:
        raise ValueError(f"{path} holds no key")
    return keys

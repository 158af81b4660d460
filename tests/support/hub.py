"""A stand-in for the Hugging Face hub: an HTTP server for the directories of repositories."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """The repositories that the server has, and what it was asked for.

    revisions: names of the one commit. gated: repositories that are refused. cut: by file name,
    after how many bytes the connection is broken off, each time that more is asked for.
    """

    repositories: dict[str, Path]
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    url: str = ""
    downloads: list[tuple[str, int]] = field(default_factory=list)  # (file, first byte)

    @property
    def files(self) -> set[str]:
        """The names of the files that were downloaded."""
        return {name for name, _ in self.downloads}


class Handler(BaseHTTPRequestHandler):
    """The three requests that `huggingface_hub.snapshot_download` makes."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_) -> None:
        pass

    def answer(self, body: bool) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if path[:2] == ["api", "models"]:
            repository = "/".join(path[2:4])
            kind, revision = path[4:6] if len(path) > 4 else ("revision", "main")
        else:
            repository, kind, revision = "/".join(path[:2]), path[2], path[3]
        directory = self.hub.repositories.get(repository)
        if directory is None:
            return self.refuse(401, "RepoNotFound")
        if revision not in self.hub.revisions:
            return self.refuse(404, "RevisionNotFound")
        if kind == "tree":
            return self.send(json.dumps([entry(file, directory) for file in listed(directory)]))
        if kind != "resolve":
            names = [{"rfilename": str(file.relative_to(directory))} for file in listed(directory)]
            return self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": names}))
        if repository in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        return self.send_file(directory / "/".join(path[4:]), body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def send_file(self, path: Path, body: bool) -> None:
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        self.hub.downloads.append((path.name, start))
        cut = self.hub.cut.get(path.name, len(content))
        self.wfile.write(content[start : start + cut])
        if start + cut < len(content):
            self.wfile.flush()
            self.close_connection = True


def listed(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(path: Path, directory: Path) -> dict:
    """A file as the hub lists it."""
    size = path.stat().st_size
    name = str(path.relative_to(directory))
    return {"type": "file", "path": name, "size": size, "oid": digest(path)}


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve repositories, {"ORG/NAME": directory}, on a free port of this machine."""
    hub = Hub(repositories)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

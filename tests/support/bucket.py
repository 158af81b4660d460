"""A stand-in for Google Cloud Storage: the requests of gcsfs and of tensorstore's gcs driver."""

import contextlib
import email
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TIME = "2026-01-01T00:00:00.000Z"


@dataclass
class Bucket:
    """The objects of all buckets: {(bucket, name): (content, generation)}."""

    objects: dict[tuple[str, str], tuple[bytes, int]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str, bytearray]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    generation: int = 0
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects that begin with `prefix`, as BUCKET/NAME."""
        names = sorted("/".join(key) for key in list(self.objects))
        return [name for name in names if name.startswith(prefix)]


class Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it delays every answer by 40 ms

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def handle_request(self) -> None:
        body = self.body()
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.bucket.requests.append(f"{self.command} {self.path}")
        if url.path.startswith("/batch/"):
            return self.batch(body)
        status, content, headers = self.respond(
            self.command, url.path, query, body, dict(self.headers)
        )
        self.reply(status, content, headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def respond(
        self, method: str, path: str, query: dict, body: bytes, headers: dict
    ) -> tuple[int, bytes, dict]:
        """(status, content, headers) of a request."""
        with self.bucket.lock:
            if match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
                return self.upload(match[1], query, body, headers)
            match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path)
            if match and ("/rewriteTo/" in path or "/copyTo/" in path):
                return self.copy(path)
            if match:
                return self.object(method, match[1], unquote(match[2]), query, headers)
            if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
                return self.listing(match[1], query)
            if match := re.fullmatch(r"/storage/v1/b/([^/]+)(/storageLayout)?", path):
                return answer({"kind": "storage#bucket", "name": match[1], "timeCreated": TIME})
        return 404, b"{}", {}

    def described(self, key: tuple[str, str]) -> dict:
        content, generation = self.bucket.objects[key]
        return {
            "kind": "storage#object",
            "bucket": key[0],
            "name": key[1],
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": TIME,
            "updated": f"2026-01-01T00:{generation // 60 % 60:02d}:{generation % 60:02d}.000Z",
        }

    def store(self, key: tuple[str, str], content: bytes) -> tuple[int, bytes, dict]:
        self.bucket.generation += 1
        self.bucket.objects[key] = (content, self.bucket.generation)
        return answer(self.described(key))

    def conflict(self, key: tuple[str, str], query: dict) -> bool:
        """Whether the object is of another generation than the request demands."""
        expected = query.get("ifGenerationMatch")
        _, generation = self.bucket.objects.get(key, (b"", 0))
        return expected is not None and int(expected) != generation

    def upload(self, bucket: str, query: dict, body: bytes, headers: dict):
        kind = query.get("uploadType")
        if kind == "multipart":
            content_type = headers["Content-Type"].encode()
            message = email.message_from_bytes(b"Content-Type: " + content_type + b"\n\n" + body)
            metadata, _ = message.get_payload()
            name = json.loads(metadata.get_payload())["name"]
            boundary = message.get_boundary().encode()
            content = body.split(b"--" + boundary)[2]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            key = (bucket, name)
        elif kind == "resumable" and "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            upload_id = str(len(self.bucket.uploads))
            self.bucket.uploads[upload_id] = (bucket, name, bytearray())
            query = f"uploadType=resumable&upload_id={upload_id}"
            location = f"{self.bucket.url}/upload/storage/v1/b/{bucket}/o?{query}"
            return 200, b"", {"Location": location}
        elif kind == "resumable":
            *key, content = self.bucket.uploads[query["upload_id"]]
            content += body
            if headers.get("Content-Range", "").endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"}
            key, content = (key[0], key[1]), bytes(content)
        else:
            key, content = (bucket, query["name"]), body
        if self.conflict(key, query):
            return 412, b"{}", {}
        return self.store(key, content)

    def copy(self, path: str):
        source, target = re.split(r"/(?:rewriteTo|copyTo)/", path)
        keys = [
            (match[1], unquote(match[2]))
            for text in (source, "/storage/v1/" + target)
            if (match := re.search(r"/b/([^/]+)/o/(.+)$", text))
        ]
        if keys[0] not in self.bucket.objects:
            return 404, b"{}", {}
        self.store(keys[1], self.bucket.objects[keys[0]][0])
        return answer({"done": True, "resource": self.described(keys[1])})

    def object(self, method: str, bucket: str, name: str, query: dict, headers: dict):
        key = (bucket, name)
        if key not in self.bucket.objects:
            return 404, b"{}", {}
        if self.conflict(key, query):
            return 412, b"{}", {}
        content, generation = self.bucket.objects[key]
        if method == "DELETE":
            del self.bucket.objects[key]
            return 204, b"", {}
        if query.get("alt") != "media":
            return answer(self.described(key))
        if str(generation) == query.get("ifGenerationNotMatch"):
            return 304, b"", {}
        generations = {
            "x-goog-generation": str(generation),
            "Date": "Thu, 01 Jan 2026 00:00:00 GMT",
        }
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", headers.get("range", "")))
        if not span:
            return 200, content, generations
        size = len(content)
        start = int(span[1]) if span[1] else max(0, size - int(span[2]))
        end = min(size, int(span[2]) + 1 if span[1] and span[2] else size)
        if start >= size:
            return 416, b"", {}
        generations["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return 206, content[start:end], generations

    def listing(self, bucket: str, query: dict):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for owner, name in sorted(self.bucket.objects):
            if owner != bucket or not name.startswith(prefix) or name < start:
                continue
            if end and name >= end:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.described((owner, name)))
        return answer({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def batch(self, body: bytes) -> None:
        """Several requests in one; gcsfs deletes with it."""
        content_type = self.headers["Content-Type"].encode()
        message = email.message_from_bytes(b"Content-Type: " + content_type + b"\n\n" + body)
        parts = []
        for part in message.get_payload():
            request = part.get_payload().strip().splitlines()[0].split()
            path = urlsplit(request[1])
            query = {key: values[0] for key, values in parse_qs(path.query).items()}
            status, _, _ = self.respond(request[0], path.path, query, b"", {})
            content_id = part.get("Content-ID", "")
            parts.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: {content_id}\r\n\r\n"
                f"HTTP/1.1 {status} OK\r\n\r\n\r\n"
            )
        content = ("".join(parts) + "--batch--").encode()
        self.reply(200, content, {"Content-Type": 'multipart/mixed; boundary="batch"'})


class Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Clients close connections that they keep open; that is no error."""


def answer(value: dict) -> tuple[int, bytes, dict]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serve an empty bucket of any name; yields it and the environment that leads clients to it."""
    bucket = Bucket()
    handler = type("BucketHandler", (Handler,), {"bucket": bucket})
    server = Server(("127.0.0.1", 0), handler)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "STORAGE_EMULATOR_HOST": bucket.url,
        "TENSORSTORE_GCS_HTTP_URL": bucket.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCE_METADATA_ROOT": "127.0.0.1:9",  # no metadata server
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
    }
    try:
        yield bucket, environment
    finally:
        server.shutdown()
        server.server_close()

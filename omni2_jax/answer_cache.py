"""Answers of a chat model on disk, so that none is paid for twice."""

import hashlib
import json
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class AnswerCache:
    """Answers by their requests. Each process appends to a file of its own in the directory, and
    reads those of all processes when it begins. Threads may share a cache.

    A line that was cut off is passed over: the process was killed when it wrote it.
    """

    def __init__(self, directory: Path):
        self.lock = threading.Lock()
        self.answers: dict[str, str] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.glob("answers-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    key, text = json.loads(line)
                    self.answers[key] = text
        name = f"answers-{uuid.uuid4().hex}.jsonl"  # process ids are used again
        self.file = open(directory / name, "ab")  # noqa: SIM115 - it lives as long as the process

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The answer to a request, if there is one."""
        return self.answers.get(digest(request))

    def put(self, request: Mapping[str, Any], answer: str) -> None:
        """Keep an answer. When this returns, it survives the end of this process."""
        key = digest(request)
        line = json.dumps([key, answer]).encode() + b"\n"
        with self.lock:
            self.answers[key] = answer
            self.file.write(line)
            self.file.flush()


def digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]

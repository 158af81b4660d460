"""A job of the tests: it reverses words, slowly where asked, and notes every call in a file.

python -m tests.support.jobs OUT COUNT DELAY [KIND [RAY]]
"""

import functools
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from omni2_jax.files import atomic_write
from omni2_jax.jobs import Item, Job, Refused, Result, Where


class Reverser:
    """Reverses payloads. A line of `calls` is one call: the item, and the process."""

    def __init__(self, calls: Path, delay: float = 0):
        self.calls, self.delay = calls, delay

    def __call__(self, payload: dict[str, Any]) -> Result:
        with open(self.calls, "a") as file:
            file.write(f"{payload['id']} {os.getpid()}\n")
        time.sleep(self.delay)
        if payload.get("error"):
            raise OSError(payload["error"])
        if payload.get("death"):
            os._exit(9)
        text = payload["text"]
        if len(text) % 7 == 0:
            raise Refused("length", f"{text!r} has {len(text)} letters")
        name = f"text/{payload['id']}.txt"
        return Result({"text": text[::-1]}, {name: text[::-1].encode()})


def items(count: int, **changes: dict[str, Any]) -> list[Item]:
    """Items w0, w1, ...; `changes` of payloads by key."""
    payloads = [{"id": f"w{i}", "text": f"word {i} " + "x" * (i % 11)} for i in range(count)]
    return [Item(one["id"], one | changes.get(one["id"], {})) for one in payloads]


def job(out: Path, delay: float = 0, **changes: Any) -> Job:
    """The job, with its directory and its file of calls in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    make = functools.partial(Reverser, out / "calls", delay)
    return Job(**{"name": "words", "directory": out / "job", "settings": {"seed": 1}, "make": make,
                  "workers": 4} | changes)  # fmt: skip


def calls(out: Path) -> Counter[str]:
    """How often each item was processed."""
    return Counter(line.split()[0] for line in (out / "calls").read_text().splitlines())


def processes(out: Path) -> set[str]:
    """The processes that called the function."""
    path = out / "calls"
    return {line.split()[1] for line in path.read_text().splitlines()} if path.exists() else set()


def write(results, path: Path) -> None:
    """The results as a file, whose bytes are compared."""
    with atomic_write(path) as file:
        for outcome in results:
            texts = [(results.directory / name).read_text() for name in outcome.files]
            file.write(json.dumps([outcome.key, outcome.value, outcome.reason, texts]) + "\n")


def main(out: str, count: str, delay: str, kind: str = "threads", ray: str | None = None) -> None:
    results = job(Path(out), float(delay), kind=kind).run(items(int(count)), Where(None, ray))
    assert results is not None
    write(results, Path(out) / "result.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])

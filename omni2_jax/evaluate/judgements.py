"""A store of what judges said, so that no judgement is paid for twice."""

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any


class Judgements:
    """A file of judgements by what was asked. Threads and processes may share it.

    A judgement is on the disk when `put` returns. Raises ValueError naming the file if it cannot be
    used.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store = sqlite3.connect(path, check_same_thread=False, timeout=60)
            self.execute("CREATE TABLE IF NOT EXISTS judgements (question PRIMARY KEY, said)")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"{path} cannot hold judgements: {error}") from None

    def get(self, *question: Any) -> str | None:
        """What was said to a question, any JSON-able values; None if it was not asked yet."""
        rows = self.execute("SELECT said FROM judgements WHERE question = ?", key(question))
        return rows[0][0] if rows else None

    def put(self, said: str, *question: Any) -> None:
        """Keep what was said to a question."""
        self.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?)", key(question), said)

    def execute(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        """Run one statement as a transaction -> its rows."""
        with self.lock, self.store:
            return self.store.execute(statement, values).fetchall()


def key(question: Any) -> str:
    """A short text for a question."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()

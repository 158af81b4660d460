"""A program that keeps running and speaks line after line, as piper: its model is loaded once."""

import atexit
import contextlib
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.synthesize.engines.base import PROBE, EngineError
from omni2_jax.synthesize.engines.command import (
    check_listed,
    check_program,
    kill_group,
    last_line,
    read_wav,
)
from omni2_jax.synthesize.voices import EngineEntry, Voice, expanded, filled

ANSWER = re.compile(r"(\S+\.wav)['\"]?\s*$")


class ResidentEngine:
    """Keeps processes of `entry.command`, as many for each voice as are called at the same time."""

    def __init__(self, name: str, entry: EngineEntry):
        self.name, self.entry = name, entry
        self.idle: dict[Voice, list[Resident]] = {}
        self.lock = threading.Lock()

    def check(self, voices: Sequence[str]) -> None:
        """See `Engine`. Every voice is probed: a process with it stays."""
        check_program(self.name, expanded(self.entry.command[0]))
        check_listed(self.name, self.entry, voices)
        first = tuple((name, values[0]) for name, values in self.entry.settings.items())
        for voice in voices:
            try:
                self.speak(PROBE, Voice(self.name, voice, first), 0, recordings.INPUT_RATE)
            except EngineError as error:
                raise ValueError(f"engine {self.name}, voice {voice!r}: {error}") from None

    def speak(self, text: str, voice: Voice, seed: int, rate: int) -> np.ndarray:
        """See `Engine`. A process that fails is ended, and the next text starts another one."""
        with self.lock:
            idle = self.idle.setdefault(voice, [])
            resident = idle.pop() if idle else None
        resident = resident or Resident(self.entry, voice, seed)
        try:
            samples = resident.speak(text, rate)
        except BaseException:
            resident.close()
            raise
        with self.lock:
            self.idle[voice].append(resident)
        return samples

    # An engine is sent to other processes without its own.

    def __getstate__(self) -> tuple[str, EngineEntry]:
        return self.name, self.entry

    def __setstate__(self, state: tuple[str, EngineEntry]) -> None:
        self.__init__(*state)


class Resident:
    """One running process. Raises EngineError if it cannot be started."""

    def __init__(self, entry: EngineEntry, voice: Voice, seed: int):
        self.timeout = entry.timeout
        self.folder = tempfile.TemporaryDirectory(prefix="omni2-speech-")
        values = {"out_dir": self.folder.name, "voice": voice.name, "seed": seed}
        values |= dict(voice.settings)
        self.arguments = [filled(argument, values) for argument in entry.command]
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        try:
            self.process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.folder.name,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise EngineError(f"cannot run {self.arguments[0]}: {error}") from None
        atexit.register(self.close)
        threading.Thread(target=self.read_lines, daemon=True).start()

    def read_lines(self) -> None:
        """Pass on what the process prints; None at its end."""
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed
            for line in self.process.stdout:
                self.lines.put(line.decode(errors="replace"))
        self.lines.put(None)

    def speak(self, text: str, rate: int) -> np.ndarray:
        """A text as samples [N] at `rate` Hz. Raises EngineError if the process gives none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((" ".join(text.split()) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended; what it printed says why
        path, printed = self.answer()
        samples = read_wav(path, rate, printed)
        path.unlink()
        return samples

    def answer(self) -> tuple[Path, str]:
        """The wav that the process names next, and what it printed."""
        printed, end = "", time.monotonic() + self.timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                message = f"{self.arguments[0]} took more than {self.timeout:g} s"
                raise EngineError(message) from None
            if line is None:
                raise EngineError(f"{self.arguments[0]} ended: {last_line(printed)}")
            printed += line
            if match := ANSWER.search(line):
                path = Path(self.folder.name) / match[1]
                if path.exists():
                    return path, printed

    def close(self) -> None:
        """End the process."""
        kill_group(self.process)
        self.process.wait()
        atexit.unregister(self.close)
        self.folder.cleanup()

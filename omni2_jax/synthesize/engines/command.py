"""A program that is run for each clip: espeak-ng, flite, or a script of one's own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.synthesize.engines.base import MAX_SECONDS, PROBE, EngineError
from omni2_jax.synthesize.voices import EngineEntry, Voice, expanded, filled

LIST_SECONDS = 30


class CommandEngine:
    """Runs `entry.command`, see `voices`. name: the engine's name in the voices file."""

    def __init__(self, name: str, entry: EngineEntry):
        self.name, self.entry = name, entry

    def check(self, voices: Sequence[str]) -> None:
        """See `Engine`. With lists of voices, one voice is probed; without, all of them."""
        check_program(self.name, expanded(self.entry.command[0]))
        check_listed(self.name, self.entry, voices)
        first = tuple((name, values[0]) for name, values in self.entry.settings.items())
        for voice in voices[:1] if self.entry.lists else voices:
            try:
                self.speak(PROBE, Voice(self.name, voice, first), 0, recordings.INPUT_RATE)
            except EngineError as error:
                raise ValueError(f"engine {self.name}, voice {voice!r}: {error}") from None

    def speak(self, text: str, voice: Voice, seed: int, rate: int) -> np.ndarray:
        """See `Engine`."""
        with tempfile.TemporaryDirectory(prefix="omni2-speech-") as folder:
            out, text_file = Path(folder) / "speech.wav", Path(folder) / "text.txt"
            text_file.write_text(text, encoding="utf-8")
            values = {
                # An argument that begins with a dash would be an option.
                "text": f" {text}" if text.startswith("-") else text,
                "text_file": text_file,
                "out": out,
                "out_dir": folder,
                "voice": voice.name,
                "seed": seed,
                **dict(voice.settings),
            }
            printed = run(
                [filled(argument, values) for argument in self.entry.command], self.entry.timeout
            )
            return read_wav(out, rate, printed)


def check_program(engine: str, program: str) -> None:
    """Raise ValueError unless a program can be run."""
    if shutil.which(program) is None:
        raise ValueError(f"engine {engine}: there is no program {program!r}")


def check_listed(engine: str, entry: EngineEntry, voices: Sequence[str]) -> None:
    """Raise ValueError unless the engine's lists name all parts of all voices."""
    if not entry.lists:
        return
    try:
        printed = " ".join(
            run([expanded(word) for word in one], LIST_SECONDS) for one in entry.lists
        )
    except EngineError as error:
        raise ValueError(f"engine {engine}: its list of voices: {error}") from None
    for voice in voices:
        for part in voice.split("+"):
            if not re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", printed):
                raise ValueError(f"engine {engine} lists no voice {part!r}")


def run(arguments: Sequence[str], seconds: float) -> str:
    """Run a program to its end: what it printed. Raises EngineError unless it succeeds.

    It has a process group of its own: an interrupt is for this program, and all that it started
    ends with it.
    """
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot run {arguments[0]}: {error}") from None
    try:
        printed = process.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise EngineError(f"{arguments[0]} took more than {seconds:g} s") from None
    finally:
        kill_group(process)
        process.communicate()  # closes its pipes, and ends it for the system, too
    if process.returncode:
        raise EngineError(f"{arguments[0]} failed ({process.returncode}): {last_line(printed)}")
    return printed


def kill_group(process: subprocess.Popen) -> None:
    """End a process that leads a group of its own, and all of the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def read_wav(path: Path, rate: int, printed: str) -> np.ndarray:
    """The samples [N] of a clip at `rate` Hz. Raises EngineError if there are none."""
    if not path.exists():
        raise EngineError(f"no wav was written; the program said: {last_line(printed)}")
    try:
        return recordings.load(path, rate, MAX_SECONDS)
    except ValueError as error:
        raise EngineError(str(error)) from None


def last_line(printed: str) -> str:
    """The last line that a program printed, shortened."""
    lines = printed.split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing")

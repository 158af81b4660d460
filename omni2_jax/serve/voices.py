"""The voices that clients may choose: those of the checkpoint, and those that clients have added.

Of a recording only its x-vector is kept, as NAME.npy in a folder that only this user can read.
"""

import asyncio
import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint import voices
from omni2_jax.files import atomic_write
from omni2_jax.serve.audio import private_file
from omni2_jax.serve.events import EventError, Voice

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ONE_VOICE = "default"  # what the voice of a flow of one voice is called
# The names of OpenAI's voices, which clients ask for without being told. They mean the first voice,
# unless a voice has such a name.
OPENAI_NAMES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
)


class Voices:
    """The voices of a model, and of a folder to which clients may add some.

    folder: None takes no voices of clients. Raises ValueError if it cannot be used, or if the model
    speaks and has no voice to speak with.
    """

    def __init__(self, model: Any, folder: Path | None, most: int):
        """most: how many voices the folder takes."""
        self.model, self.folder, self.most = model, folder, most
        self.config, self.started = model.config, int(time.time())
        self.lock = asyncio.Lock()
        if folder:
            check_folder(folder)
        elif self.config.flow:
            model.voice(None)

    @property
    def stored(self) -> list[str]:
        """The names of the model's own voices."""
        if not self.config.flow:
            return []
        if self.config.flow.speaker == 1:
            return [ONE_VOICE]
        return voices.names(Path(self.model.directory))

    @property
    def added(self) -> list[str]:
        """The names of the voices that clients have added."""
        return sorted(path.stem for path in self.folder.glob("*.npy")) if self.folder else []

    @property
    def names(self) -> list[str]:
        return [*self.stored, *self.added]

    def find(self, voice: str | Voice | None) -> str | None:
        """The name of the voice that a client asks for; the first one by default.

        Raises EventError if there is none of this name; a path is never read.
        """
        name = voice.id if isinstance(voice, Voice) else voice
        names = self.names
        if name in names:
            return name
        if name is not None and name not in OPENAI_NAMES:
            known = ", ".join(names) or "none"
            raise EventError(f"there is no voice {name!r}; the voices are: {known}", param="voice")
        return names[0] if names else None

    def x_vector(self, name: str | None) -> jax.Array | None:
        """What the model needs of a voice that `find` has named. Raises ValueError without one."""
        if self.folder and name in self.added:
            return jnp.asarray(voices.load(self.folder / f"{name}.npy", self.config))
        if self.config.flow and name is None:
            raise EventError("there is no voice yet; add one with POST /v1/audio/voices")
        return self.model.voice(None if name == ONE_VOICE else name)

    def describe(self, name: str) -> dict:
        """A voice as the API writes it."""
        created = self.started
        if self.folder and name in self.added:
            with contextlib.suppress(OSError):  # deleted meanwhile
                created = int((self.folder / f"{name}.npy").stat().st_mtime)
        kind = {"object": "audio.voice", "type": "audio_sample"}
        return {"id": name, "name": name, "created_at": created, **kind}

    async def add(self, name: str, consent: str, recording: bytes) -> None:
        """Make a voice of a sound file; its first 30 s count.

        Raises EventError if the server takes none, without consent, and for a name that is taken or
        bad; ValueError if the recording cannot be used.
        """
        folder = self.check_new(name, consent)
        async with self.lock:  # one at a time: others are answered meanwhile
            x_vector = await asyncio.to_thread(self.embed, recording)
            self.check_new(name, consent)
            with atomic_write(folder / f"{name}.npy", "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                np.save(file, x_vector)

    def check_new(self, name: str, consent: str) -> Path:
        """The folder for a new voice. Raises EventError if it cannot be added."""
        if not self.folder:
            raise EventError("this server takes no voices (`omni2 serve --voices DIR`)")
        if not self.config.flow or self.config.flow.speaker == 1 or not self.config.speaker:
            raise EventError("this model cannot speak in the voice of a recording")
        if consent.lower() != "true":
            raise EventError(
                "consent is not `true`: state that the speaker has agreed to this", param="consent"
            )
        if not NAME.fullmatch(name):
            raise EventError(
                "a name has 1 to 64 letters, digits, - and _, and begins with a letter or digit",
                param="name",
            )
        if name in self.names:
            raise EventError(f"there is a voice {name!r} already", param="name")
        if len(self.added) >= self.most:
            raise EventError(f"the server keeps {self.most} voices at most; delete one")
        return self.folder

    def embed(self, recording: bytes) -> np.ndarray:
        """The x-vector [192] of a sound file."""
        with private_file(recording) as path:
            return voices.from_file(Path(self.model.directory), self.config, Path(path))

    def delete(self, name: str) -> None:
        """Remove a voice that a client has added. Raises EventError for any other name.

        Conversations that use it go on with it.
        """
        if not self.folder or name not in self.added:
            raise EventError(f"no client has added a voice {name!r}", "voice_not_found")
        (self.folder / f"{name}.npy").unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Create the folder, for this user only. Raises ValueError if files cannot be written there."""
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise ValueError(f"cannot create {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}")

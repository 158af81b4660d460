"""`python -m benchmarks.soak`: a server under mixed load for long; what it holds must not grow.

Three clients at a time: they talk by push-to-talk, talk as a microphone does and let the server
hear the end of their turn, ask over HTTP for a stream, interrupt an answer and ask again, go away
in the middle, send nonsense, or have a text spoken. Every answer that nobody interrupted must be
what the same client gets when nobody else is there. The server's memory, threads and open files are
read from /proc (Linux), and its log must hold no failure.
"""

import asyncio
import base64
import collections
import io
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import rich.table
import soundfile
import typer

from benchmarks.serve import (
    BYTES,
    RefusedError,
    ask,
    base64_of,
    connected,
    converse,
    server_of,
    take_answer,
    take_event,
)
from omni2_jax.console import progress_bar, run_function
from omni2_jax.serve.server import FAILED

CLIENTS = 3
TURNS = 2  # of a conversation
TEXT = "Good evening."  # to be spoken
KINDS = ("talk", "listen", "complete", "interrupt", "vanish", "babble", "speak")
SAMPLES = 20  # how often the server is looked at
# What may be added after the first quarter, when caches and pools have their sizes.
ALLOWED = {"memory_mb": 64.0, "threads": 4.0, "files": 8.0}
console = rich.console.Console()


def held(pid: int) -> dict[str, float]:
    """What a process holds: resident memory, threads, open files."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "memory_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": float(fields["Threads"]),
        "files": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
    }


async def talk(url: str, question: str) -> list[tuple[str, bytes]]:
    """A conversation -> the text and the audio of its answers."""
    answers = await converse(url, question, TURNS, itertools.repeat(0.1), lambda: None)
    return [(answer.text, answer.audio) for answer in answers]


async def interrupt(url: str, question: str, chance: random.Random) -> None:
    """Stop an answer that has begun, forget what was not heard, and ask again."""
    async with connected(url) as socket:
        await ask(socket, question)
        while (event := await take_event(socket))["type"] != "response.output_audio.delta":
            pass
        received = 1000 * len(base64.b64decode(event["delta"])) // BYTES
        place = {"item_id": event["item_id"], "content_index": 0}
        place["audio_end_ms"] = chance.randint(0, received)
        # The server stops an answer that is truncated while it is being generated.
        await socket.send(json.dumps({"type": "conversation.item.truncate", **place}))
        while (await take_event(socket))["type"] != "conversation.item.truncated":
            pass
        await ask(socket, question)
        await take_answer(socket)


async def vanish(url: str, question: str, chance: random.Random) -> None:
    """Ask, and go away without a word at a random moment."""
    async with connected(url) as socket:
        await ask(socket, question)
        await asyncio.sleep(chance.uniform(0, 3))
        socket.transport.abort()


async def babble(url: str, chance: random.Random) -> None:
    """Send events that cannot be carried out. Raises RuntimeError unless each gets an error."""
    kinds = ["input_audio_buffer.commit", "response.cancel", "nothing", "session.update"]
    async with connected(url) as socket:
        while (await take_event(socket))["type"] != "session.updated":
            pass
        for _ in range(100):
            await socket.send(json.dumps({"type": chance.choice(kinds)}))
        for _ in range(100):
            event = json.loads(await socket.recv())
            if event["type"] != "error":
                raise RuntimeError(f"a faulty event was answered by {event['type']}")


async def listen(url: str, question: str) -> tuple[str, bytes]:
    """Say a question as fast as people do, then be silent -> the text and audio of the answer."""
    (answer,) = await converse(url, question, 1, itertools.repeat(0.1), lambda: None, vad=True)
    return answer.text, answer.audio


def client_of(url: str):
    """OpenAI's own client, for what is asked over HTTP."""
    import openai

    address = url.removeprefix("ws://").split("/")[0]
    return openai.AsyncOpenAI(api_key="x", base_url=f"http://{address}/v1")


async def complete(url: str, question: str) -> tuple[str, bytes]:
    """Ask for a chat completion, piece by piece -> the text and the audio of the answer.

    Raises an error of openai's client if it fails.
    """
    data = io.BytesIO()
    samples = np.frombuffer(base64.b64decode(question), "<i2")
    soundfile.write(data, samples, BYTES // 2, format="WAV")
    part = {"data": base64.b64encode(data.getvalue()).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": part}]
    text, audio = "", b""
    async with client_of(url) as client:
        stream = await client.chat.completions.create(
            model="omni2",
            messages=[{"role": "user", "content": content}],  # pyright: ignore
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "pcm16"},
            stream=True,
        )
        async for chunk in stream:
            if piece := getattr(chunk.choices[0].delta, "audio", None):
                text += getattr(piece, "transcript", None) or ""
                audio += base64.b64decode(getattr(piece, "data", None) or "")
    if not audio:
        raise RuntimeError("a chat completion has no audio")
    return text, audio


async def speak(url: str) -> bytes:
    """Have a text spoken. Raises an error of openai's client if it fails."""
    async with client_of(url) as client:
        speech = await client.audio.speech.create(
            model="omni2", voice="alloy", input=TEXT, response_format="wav"
        )
        return speech.read()


@dataclass
class Load:
    """Clients, and how many there were of each kind; `run` one or several of them."""

    url: str
    question: str
    end: float  # time.monotonic() after which no client begins
    alone: dict[str, object] = field(default_factory=dict)  # what clients get when nobody is there
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    async def client(self, kind: str, chance: random.Random) -> object:
        """One client -> what it got, where that does not depend on chance."""
        asking = {"talk": talk, "listen": listen, "complete": complete}
        if kind in asking:
            return await asking[kind](self.url, self.question)
        if kind == "speak":
            return await speak(self.url)
        if kind == "babble":
            return await babble(self.url, chance)
        client = interrupt if kind == "interrupt" else vanish
        return await client(self.url, self.question, chance)

    async def measure_alone(self) -> None:
        """Note what clients get when nobody else is there."""
        for kind in ("talk", "listen", "complete", "speak"):
            self.alone[kind] = await self.client(kind, random.Random())

    async def run(self, seed: int) -> None:
        """One client after the other. Raises RuntimeError if one gets what it should not."""
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            kind = chance.choice(KINDS)
            try:
                got = await self.client(kind, chance)
            except RefusedError:  # somebody who has vanished was not missed yet
                self.counts["refused"] += 1
                await asyncio.sleep(1)
                continue
            if got != self.alone.get(kind):
                raise RuntimeError(f"an answer differs from the same one alone ({kind})")
            self.counts[kind] += 1


async def watch(pid: int, seconds: float) -> list[dict[str, float]]:
    """What the server holds, SAMPLES times."""
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("load", total=SAMPLES)
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            rows.append(held(pid))
            bar.advance(task)
    return rows


async def soak(url: str, pid: int, question: str, seconds: float):
    """Load a server -> what it held, and how many clients of each kind there were.

    Raises RuntimeError as soon as one of them gets what it should not.
    """
    load = Load(url, question, 0.0)
    await load.measure_alone()
    load.end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(pid, seconds))
        for seed in range(CLIENTS):
            group.create_task(load.run(seed))
    return watching.result(), load.counts


def check(rows: list[dict[str, float]]) -> None:
    """Raises ValueError if the server holds more at the end than after the first quarter."""
    for name, allowed in ALLOWED.items():
        grown = rows[-1][name] - rows[SAMPLES // 4 - 1][name]
        if grown > allowed:
            raise ValueError(f"{name} grew by {grown:.0f}, at most {allowed:.0f} is allowed")


def main(
    question: Annotated[Path, typer.Argument(help="A recording to ask, without pauses.")],
    checkpoint: Annotated[
        Path, typer.Option(help="A checkpoint, which `omni2 serve` is started with.")
    ],
    server: Annotated[str, typer.Option(help="Options of `omni2 serve`, as in a shell.")] = "",
    minutes: Annotated[float, typer.Option(min=0.1)] = 30.0,
) -> None:
    """Load a server for long. Exits with an error if it fails or what it holds grows."""
    sound = base64_of(question)
    with server_of(checkpoint, CLIENTS + 1, server) as process:
        try:
            rows, counts = asyncio.run(soak(process.url, process.pid, sound, 60 * minutes))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        log = process.log.read_text()
    table = rich.table.Table("", *rows[0])
    for quarter in range(1, 5):
        row = rows[quarter * SAMPLES // 4 - 1]
        table.add_row(f"quarter {quarter}", *(f"{value:.0f}" for value in row.values()))
    console.print(table)
    console.print(", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())))
    check(rows)
    if "Traceback" in log or FAILED in log:
        console.print(log, markup=False)
        raise ValueError("the server's log has a failure")


if __name__ == "__main__":
    run_function(main)

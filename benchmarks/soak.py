"""`python -m benchmarks.soak`: a server under mixed load for long; what it holds must not grow.

Three clients at a time: they talk, go away in the middle, send nonsense, or have a text spoken.
The server's memory, threads and open files are read from /proc (Linux).
"""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Annotated

import rich.console
import rich.table
import typer

from benchmarks.serve import RefusedError, base64_of, converse, server_of
from omni2_jax.cli.console import progress_bar, run_function

CLIENTS = 3
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


async def vanish(url: str, question: str, chance: random.Random) -> None:
    """Ask, and go away without a word at a random moment."""
    import websockets

    socket = await websockets.connect(url, max_size=None)
    await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": question}))
    await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
    await socket.send(json.dumps({"type": "response.create"}))
    await asyncio.sleep(chance.uniform(0, 3))
    socket.transport.abort()


async def babble(url: str, chance: random.Random) -> None:
    """Send events that cannot be carried out. Raises RuntimeError unless each gets an error."""
    import websockets

    kinds = ["input_audio_buffer.commit", "response.cancel", "nothing", "session.update"]
    async with websockets.connect(url) as socket:
        if json.loads(await socket.recv())["type"] == "error":
            raise RefusedError("full")
        for _ in range(100):
            await socket.send(json.dumps({"type": chance.choice(kinds)}))
        for _ in range(100):
            event = json.loads(await socket.recv())
            if event["type"] != "error":
                raise RuntimeError(f"a faulty event was answered by {event['type']}")


async def speak(url: str) -> None:
    """Have a text spoken. Raises an error of openai's client if it fails."""
    import openai

    address = url.removeprefix("ws://").split("/")[0]
    async with openai.AsyncOpenAI(api_key="x", base_url=f"http://{address}/v1") as client:
        await client.audio.speech.create(
            model="omni2", voice="alloy", input="Good evening.", response_format="wav"
        )


async def load(url: str, question: str, end: float, seed: int, counts: dict[str, int]) -> None:
    """One client after the other, until `end`."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        kind = chance.choice(["converse", "vanish", "babble", "speak"])
        if kind == "converse":
            await converse(url, 1, question, 2, iter([0.0, 0.1]), lambda: None)
        elif kind == "vanish":
            await vanish(url, question, chance)
        elif kind == "babble":
            await babble(url, chance)
        else:
            await speak(url)
        counts[kind] = counts.get(kind, 0) + 1


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
    """Load a server -> what it held, and how many clients of each kind there were."""
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    clients = (load(url, question, end, seed, counts) for seed in range(CLIENTS))
    rows, *_ = await asyncio.gather(watch(pid, seconds), *clients)
    return rows, counts


def main(
    question: Annotated[Path, typer.Argument(help="A recording to ask.")],
    checkpoint: Annotated[
        Path, typer.Option(help="A checkpoint, which `omni2 serve` is started with.")
    ],
    server: Annotated[str, typer.Option(help="Options of `omni2 serve`, as in a shell.")] = "",
    minutes: Annotated[float, typer.Option(min=0.1)] = 30.0,
) -> None:
    """Load a server for long. Exits with an error if it fails or what it holds grows."""
    with server_of(checkpoint, CLIENTS + 1, server) as (url, pid):
        rows, counts = asyncio.run(soak(url, pid, base64_of(question), 60 * minutes))
    table = rich.table.Table("", *rows[0])
    for name, row in {"after a quarter": rows[SAMPLES // 4], "at the end": rows[-1]}.items():
        table.add_row(name, *(f"{value:.0f}" for value in row.values()))
    console.print(table)
    console.print(", ".join(f"{count} x {kind}" for kind, count in counts.items()))
    for name, allowed in ALLOWED.items():
        grown = rows[-1][name] - rows[SAMPLES // 4][name]
        if grown > allowed:
            raise ValueError(f"{name} grew by {grown:.0f}, at most {allowed:.0f} is allowed")


if __name__ == "__main__":
    run_function(main)

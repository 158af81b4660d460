"""`python -m benchmarks.serve`: how many people a server can talk to at the same time.

For each number c of clients, c WebSockets speak OpenAI's Realtime API. A client asks a recording,
takes the answer, waits for a time that is exponentially distributed (so that questions arrive as a
Poisson process), and asks again. With `--vad` it speaks in real time, with silence behind it, and
the server finds the end of the question. The terms are those of `vllm bench serve --omni`:

audio_ttfp      from the end of the question (with --vad: `speech_stopped`) to the first packet
audio_rtf       seconds to the last packet, by the seconds of audio
audio_underrun  the longest that a player had to wait, which began with the first packet
continuity      the share of answers whose underrun is at most 100 ms
"""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import rich.table
import soxr
import typer

from omni2_jax.audio import recordings
from omni2_jax.console import progress_bar, run_function

MAX_UNDERRUN = 0.1  # seconds that are not heard as a gap
HOLDS = 0.99  # the share of continuous answers that a number of clients needs to hold
PIECE = 0.04  # seconds of sound in an event of a client that speaks in real time
NOTICE_SECONDS = 10.0  # in which the server must notice that a question is over
SETTLE_SECONDS = 0.5  # in which the server notices that the clients before have gone
BYTES = 2 * recordings.OUTPUT_RATE  # a second of audio
console = rich.console.Console()


class RefusedError(RuntimeError):
    """The server takes no more sessions."""


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    packets: list[tuple[float, float]]  # (seconds since the question, seconds of audio) of each
    text: str
    audio: bytes


@dataclass(frozen=True)
class Turn:
    """What a client saw of one answer, in seconds."""

    clients: int
    audio_ttfp: float
    audio_rtf: float
    audio_duration: float
    audio_underrun: float

    @classmethod
    def of(cls, clients: int, packets: list[tuple[float, float]]) -> "Turn":
        """packets: (seconds since the end of the question, seconds of audio) of each."""
        first, played, underrun = packets[0][0], 0.0, 0.0
        start = first  # when a player would have begun, had it never waited
        for arrival, audio in packets:
            wait = max(0.0, arrival - start - played)
            underrun = max(underrun, wait)
            start += wait
            played += audio
        return cls(clients, first, packets[-1][0] / played, played, underrun)


@dataclass(frozen=True)
class Level:
    """The measurements with one number of clients."""

    clients: int
    turns: list[Turn]
    refused: int
    failed: int
    seconds: float

    def summary(self) -> dict[str, float]:
        """One row of the table and of the JSON lines."""
        ttfp = [1000 * turn.audio_ttfp for turn in self.turns] or [np.nan]
        rtf = [turn.audio_rtf for turn in self.turns] or [np.nan]
        underrun = [turn.audio_underrun for turn in self.turns] or [np.nan]
        return {
            "clients": self.clients,
            "completed": len(self.turns),
            "refused": self.refused,
            "failed": self.failed,
            "median_audio_ttfp_ms": float(np.median(ttfp)),
            "p95_audio_ttfp_ms": float(np.percentile(ttfp, 95)),
            "mean_audio_rtf": float(np.mean(rtf)),
            "p95_audio_rtf": float(np.percentile(rtf, 95)),
            "audio_throughput": sum(turn.audio_duration for turn in self.turns) / self.seconds,
            "max_audio_underrun_ms": 1000 * float(np.max(underrun)),
            "continuity": float(np.mean(np.array(underrun) <= MAX_UNDERRUN)),
        }

    @property
    def holds(self) -> bool:
        """Whether nobody was refused or failed, and the answers were continuous."""
        return not (self.refused or self.failed) and self.summary()["continuity"] >= HOLDS


async def converse(
    url: str,
    question: str,
    turns: int,
    pauses: Iterator[float],
    note: Callable[[], None],
    vad: bool = False,
) -> list[Answer]:
    """One client: `turns` questions, each after a pause. `note` is called after each answer.

    vad: whether it speaks in real time and the server finds the end of the question. Raises
    RefusedError, and RuntimeError if an answer fails.
    """
    answers = []
    async with connected(url, vad) as socket:
        for _ in range(turns):
            await asyncio.sleep(next(pauses))
            await (say if vad else ask)(socket, question)
            answers.append(await take_answer(socket))
            note()
    return answers


@contextlib.asynccontextmanager
async def connected(url: str, vad: bool = False):
    """A WebSocket with or without turn detection. Raises RefusedError."""
    import websockets

    async with websockets.connect(url, max_size=None) as socket:
        first = json.loads(await socket.recv())
        if first["type"] == "error":
            raise RefusedError(first["error"]["message"])
        detection = {"type": "server_vad"} if vad else None
        session = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        await socket.send(json.dumps({"type": "session.update", "session": session}))
        yield socket


async def ask(socket, question: str) -> None:
    """Send a question as base64."""
    events = (
        {"type": "input_audio_buffer.append", "audio": question},
        {"type": "input_audio_buffer.commit"},
        {"type": "response.create"},
    )
    for event in events:
        await socket.send(json.dumps(event))


async def say(socket, question: str) -> None:
    """Speak a question in real time and then silence, until the server notices its end.

    Raises TimeoutError if it does not.
    """

    sound, size = base64.b64decode(question), int(PIECE * BYTES)

    async def speak() -> None:
        start = time.perf_counter()
        for count in itertools.count():
            await asyncio.sleep(start + count * PIECE - time.perf_counter())
            piece = sound[count * size : (count + 1) * size].ljust(size, b"\0")
            event = {"type": "input_audio_buffer.append", "audio": base64.b64encode(piece).decode()}
            await socket.send(json.dumps(event))

    speaking = asyncio.create_task(speak())
    try:
        async with asyncio.timeout(len(sound) / BYTES + NOTICE_SECONDS):
            while (await take_event(socket))["type"] != "input_audio_buffer.speech_stopped":
                pass
    finally:
        speaking.cancel()


async def take_event(socket) -> dict:
    """The next event. Raises RuntimeError for an error and for an answer that has failed."""
    event = json.loads(await socket.recv())
    if event["type"] == "error":
        raise RuntimeError(event["error"]["message"])
    if event["type"] == "response.done" and event["response"]["status"] == "failed":
        raise RuntimeError(event["response"]["status_details"]["error"]["message"])
    return event


async def take_answer(socket) -> Answer:
    """The rest of an answer. Raises the errors of `take_event`."""
    start, packets, text, audio = time.perf_counter(), [], "", b""
    while (event := await take_event(socket))["type"] != "response.done":
        if event["type"] == "response.output_audio.delta":
            data = base64.b64decode(event["delta"])
            packets.append((time.perf_counter() - start, len(data) / BYTES))
            audio += data
        elif event["type"] == "response.output_audio_transcript.delta":
            text += event["delta"]
    return Answer(packets, text, audio)


async def measure(
    url: str, clients: int, questions: list[str], turns: int, pause: float, vad: bool = False
) -> Level:
    """Let so many clients ask `turns` questions each. pause: mean seconds before each of them."""
    random = np.random.default_rng(clients)

    def pauses() -> Iterator[float]:
        while True:
            yield random.exponential(pause)

    with progress_bar() as bar:
        task = bar.add_task(f"{clients} clients", total=clients * turns)
        start = time.perf_counter()
        results = await asyncio.gather(
            *(
                converse(
                    url,
                    questions[index % len(questions)],
                    turns,
                    pauses(),
                    lambda: bar.advance(task),
                    vad,
                )
                for index in range(clients)
            ),
            return_exceptions=True,
        )
        seconds = time.perf_counter() - start
    from websockets import WebSocketException

    refused = sum(isinstance(result, RefusedError) for result in results)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        if not isinstance(failure, (RuntimeError, OSError, WebSocketException)):
            raise failure
    answers = [answer for result in results if isinstance(result, list) for answer in result]
    seen = [Turn.of(clients, answer.packets) for answer in answers if answer.packets]
    return Level(clients, seen, refused, len(failures) - refused, seconds)


def base64_of(path: Path) -> str:
    """A recording as the API takes it: 16-bit samples at 24 kHz."""
    (samples,) = recordings.load_turn(path, "refuse")
    samples = soxr.resample(samples, recordings.INPUT_RATE, recordings.OUTPUT_RATE)
    return base64.b64encode(recordings.to_int16(samples).astype("<i2").tobytes()).decode()


@dataclass(frozen=True)
class Process:
    """An `omni2 serve`: the URL of its WebSocket, its process id, and what it writes."""

    url: str
    pid: int
    log: Path


@contextlib.contextmanager
def server_of(checkpoint: Path, sessions: int, options: str = "") -> Iterator[Process]:
    """An `omni2 serve` in a process of its own.

    options: more of its options, as in a shell. Raises RuntimeError if it does not start.
    """
    command = [sys.executable, "-m", "omni2_jax", "serve", "--checkpoint", str(checkpoint)]
    command += ["--port", "0", "--sessions", str(sessions), *shlex.split(options)]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while not (
                found := re.search(r"listening on http://(\S+)", Path(log.name).read_text())
            ):
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {Path(log.name).read_text()}")
                time.sleep(0.2)
            url = f"ws://{found[1]}/v1/realtime?model=omni2"
            yield Process(url, process.pid, Path(log.name))
        finally:
            process.terminate()


def table_of(rows: list[dict]) -> rich.table.Table:
    """The summaries, a column for each number of clients."""
    table = rich.table.Table("clients")
    for row in rows:
        table.add_column(str(row["clients"]), justify="right")
    for name in list(rows[0])[1:]:
        values = [row[name] for row in rows]
        is_fine = any(isinstance(value, float) and value < 100 for value in values)
        table.add_row(name, *(f"{value:.{2 if is_fine else 0}f}" for value in values))
    return table


def plot(rows: list[dict], path: Path) -> None:
    """Time to first packet and continuity against the number of clients."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    clients = [row["clients"] for row in rows]
    for name, label in {"median_audio_ttfp_ms": "median", "p95_audio_ttfp_ms": "p95"}.items():
        axes[0].plot(clients, [row[name] for row in rows], marker="o", label=label)
    axes[0].set(ylabel="time to first packet, ms", ylim=(0, None))
    axes[0].legend()
    axes[1].plot(clients, [row["mean_audio_rtf"] for row in rows], marker="o")
    axes[1].axhline(1, color="gray", linestyle=":")
    axes[1].set(ylabel="real-time factor, mean", ylim=0)
    axes[2].plot(clients, [100 * row["continuity"] for row in rows], marker="o")
    axes[2].set(ylabel="answers without a gap, %", ylim=(0, 105))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(clients, labels=[str(count) for count in clients])
        axis.minorticks_off()
        axis.set(xlabel="clients")
    figure.savefig(path, dpi=120)


def main(
    questions: Annotated[list[Path], typer.Argument(help="Recordings to ask, in turn.")],
    url: Annotated[
        str | None, typer.Option(help="A server, as ws://127.0.0.1:8000/v1/realtime?model=omni2.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Or a checkpoint, which `omni2 serve` is started with.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", "-c", help="[default: 1, 4, 8, 16 and 32]")
    ] = None,
    server: Annotated[
        str, typer.Option(help="With --checkpoint: options of `omni2 serve`, as in a shell.")
    ] = "",
    turns: Annotated[int, typer.Option(min=1, help="Questions of each client.")] = 8,
    pause: Annotated[
        float, typer.Option(min=0.0, help="Mean seconds between an answer and the next question.")
    ] = 2.0,
    vad: Annotated[
        bool, typer.Option("--vad", help="Speak in real time; the server finds a question's end.")
    ] = False,
    json_lines: Annotated[
        Path | None, typer.Option("--json", help="Write the summaries, and every answer.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw them as a PNG.")] = None,
) -> None:
    """Measure a server under load."""
    levels = sorted(clients or (1, 4, 8, 16, 32))
    if (url is None) == (checkpoint is None):
        raise ValueError("give either --url or --checkpoint")
    sounds = [base64_of(path) for path in questions]
    for path in filter(None, (json_lines, plot_file)):
        recordings.check_writable(path)
    if plot_file:
        import matplotlib  # if it is missing, say so before the long measurement

        matplotlib.use("Agg")  # no display
    with contextlib.ExitStack() as stack:
        if checkpoint:
            url = stack.enter_context(server_of(checkpoint, max(levels), server)).url
        assert url
        asyncio.run(measure(url, 1, sounds, 1, 0.0, vad))  # whatever is slow the first time
        measured = []
        for count in levels:
            time.sleep(SETTLE_SECONDS)
            measured.append(asyncio.run(measure(url, count, sounds, turns, pause, vad)))
    rows = [level.summary() for level in measured]
    console.print(table_of(rows))
    holding = [level.clients for level in measured if level.holds]
    console.print(f"largest number of clients that holds: {max(holding, default='none')}")
    if json_lines:
        turns_seen = [asdict(turn) for level in measured for turn in level.turns]
        json_lines.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *turns_seen]))
    if plot_file:
        plot(rows, plot_file)


if __name__ == "__main__":
    run_function(main)

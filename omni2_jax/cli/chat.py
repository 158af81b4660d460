"""`omni2 chat`: answer spoken questions, one conversation or a file of many."""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.console
import rich.progress
import rich.table
import typer

from omni2_jax.cli.console import console

if TYPE_CHECKING:
    from omni2_jax.generate.questions import Question


def chat(
    wavs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="QUESTION.wav ...", help="Spoken turns of one conversation."),
    ] = None,
    checkpoint: Annotated[
        Path, typer.Option(help="A checkpoint directory made by python -m convert.")
    ] = ...,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the spoken answer here; with several turns as NAME-1.wav, NAME-2.wav ..."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Answer every item of a questions.json (the released format)."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="With --questions: where answers.jsonl and ID.wav go.")
    ] = None,
    no_wav: Annotated[
        bool, typer.Option("--no-wav", help="Text and units only, no audio.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="With --questions: how many to answer at once.")
    ] = 1,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Write audio as it is made (--out - is raw 16-bit PCM on stdout), print timings.",
        ),
    ] = False,
    voice: Annotated[
        str | None,
        typer.Option(
            help="A stored voice, or a sound file to speak like. [default: the first stored]"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the text; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Sample among the likeliest text tokens of this total probability."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample among the K likeliest text tokens; 0 is off.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Over 1 makes text tokens said before less likely.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Text tokens at most.")] = 256,
    unit_temperature: Annotated[
        float,
        typer.Option(
            min=0, help="Of the speech units; 0 is greedy (which tends to repeat itself)."
        ),
    ] = 1.0,
    unit_vocabulary: Annotated[
        str, typer.Option(help="units: nothing else can be sampled; all: any token, as released.")
    ] = "units",
    max_flush_units: Annotated[
        int, typer.Option(min=1, help="Speech tokens at most after the text has ended.")
    ] = 1024,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Units that see one another in the flow; fewer cost less. [default: the checkpoint's]"
        ),
    ] = None,
    left_chunks: Annotated[
        int,
        typer.Option(
            min=-1, help="Chunks that the flow sees before its own; -1: all, as released."
        ),
    ] = 4,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut turns over 30 s (they are refused otherwise).")
    ] = False,
    split_long: Annotated[
        bool, typer.Option("--split-long", help="Hear turns over 30 s as several clips.")
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=SIZE,...",
            help="Share the model among all devices, as tensor=4 or fsdp=2,tensor=4.",
        ),
    ] = None,
) -> None:
    """Answer spoken questions in text and speech."""
    from omni2_jax.generate.omni2 import Omni2, Options
    from omni2_jax.generate.questions import read_questions
    from omni2_jax.sharding import parse_mesh

    if truncate and split_long:
        raise ValueError("--truncate and --split-long exclude each other")
    options = Options(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        unit_temperature=unit_temperature,
        unit_vocabulary=unit_vocabulary,
        max_flush_units=max_flush_units,
        seed=seed,
        chunk=chunk,
        left_chunks=None if left_chunks < 0 else left_chunks,
        long="truncate" if truncate else "split" if split_long else "refuse",
    )
    load = functools.partial(
        Omni2.load, checkpoint, decoder=not no_wav, mesh=parse_mesh(mesh) if mesh else None
    )
    if questions:
        if wavs or out or stream or out_dir is None:
            raise ValueError(
                "--questions takes --out-dir, and neither wav files, --out nor --stream"
            )
        answer_questions(
            load,
            read_questions(questions, options.long),
            out_dir,
            not no_wav,
            batch,
            voice,
            options,
        )
        return
    if not wavs:
        raise ValueError("nothing to answer: give wav files, or --questions with --out-dir")
    if str(out) == "-" and not stream:
        raise ValueError("--out - needs --stream")
    if out and no_wav:
        raise ValueError("--out and --no-wav exclude each other")
    from omni2_jax.audio import recordings

    # A bad file is told before minutes are spent on the others.
    clips = sum(len(recordings.load_turn(wav, options.long)) for wav in wavs)
    outs = targets(out, len(wavs))
    with console.status("loading"):
        model = load()
        session = model.session(voice, options, turns=len(wavs), clips=clips)
    if stream:
        converse_aloud(session, wavs, outs)
    else:
        converse(session, wavs, outs)


def targets(out: Path | None, turns: int) -> list[Path | None]:
    """One output file for each turn, all of them writable."""
    from omni2_jax.audio import recordings

    if out is None or str(out) == "-":
        return [out] * turns
    outs = (
        [out]
        if turns == 1
        else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(turns)]
    )
    for path in outs:
        recordings.check_writable(path)
    return outs


def converse(session, wavs: list[Path], outs: list[Path | None]) -> None:
    """Answer one turn after the other, the text as it comes."""
    from omni2_jax.audio import recordings
    from omni2_jax.generate.omni2 import join

    for wav, out in zip(wavs, outs, strict=True):
        if len(wavs) > 1:
            console.print(f"[bold]{wav}[/]")
        answer = join(shown(session.respond(wav), sys.stdout), spoken=True)
        seconds = len(answer.waveform) / recordings.OUTPUT_RATE
        spoken = f", {seconds:.2f} s of speech" if seconds else ""  # none with --no-wav
        console.print(f"{len(answer.units)} units{spoken}" + (f" -> {out}" if out else ""))
        if out:
            save_speech(out, answer.waveform)


def save_speech(path: Path, waveform) -> None:
    """An answer may be without a single unit; then there is nothing to write."""
    from omni2_jax.audio import recordings

    if waveform.size:
        recordings.save(path, waveform)
    else:
        console.print(f"no speech, hence no {path}")


def shown(replies: Iterator, file) -> Iterator:
    """The same replies; their text is printed as it passes."""
    for reply in replies:
        print(reply.text, end="", flush=True, file=file)
        yield reply
    print(file=file)


def converse_aloud(session, wavs: list[Path], outs: list[Path | None]) -> None:
    """Answer one turn after the other, writing samples as they are made, and print how fast that was."""
    from omni2_jax.audio import recordings

    with console.status("compiling"):
        session.engine.warm_up()
        session.hear(wavs[0])
    for wav, out in zip(wavs, outs, strict=True):
        session.stages, seconds, first = {}, 0.0, None
        marks = [time.perf_counter()]
        with recordings.WavWriter(out) as writer:
            for reply in shown(session.respond(wav), sys.stderr if str(out) == "-" else sys.stdout):
                writer.write(reply.samples)
                marks.append(time.perf_counter())
                seconds += len(reply.samples) / recordings.OUTPUT_RATE
                first = marks[-1] - marks[0] if first is None and len(reply.samples) else first
        console.print(timings(session.stages, marks, seconds, first))


def timings(
    stages: dict[str, float], marks: list[float], seconds: float, first: float | None
) -> rich.table.Table:
    """A table of an answer's times; marks: when it was asked and when each step's reply came."""
    total, steps = marks[-1] - marks[0], [b - a for a, b in itertools.pairwise(marks[1:])]
    table = rich.table.Table(show_header=False)
    table.add_row("time to first audio", f"{1000 * first:.0f} ms" if first else "no audio")
    table.add_row(
        "real-time factor",
        f"{total / seconds:.3f} ({seconds:.2f} s of speech in {total:.2f} s)"
        if seconds
        else "no audio",
    )
    for name, value in stages.items():
        table.add_row(name, f"{1000 * value:.0f} ms")
    table.add_row("first step", f"{1000 * (marks[1] - marks[0] - sum(stages.values())):.0f} ms")
    if steps:
        table.add_row(
            "later steps (mean, slowest)",
            f"{1000 * sum(steps) / len(steps):.0f} ms, {1000 * max(steps):.0f} ms",
        )
    return table


def answer_questions(
    load: Callable,
    items: "list[Question]",
    out_dir: Path,
    wav: bool,
    batch: int,
    voice: str | None,
    options,
) -> None:
    """Answer every item; a line of answers.jsonl and a wav are written as soon as an answer is whole."""
    from omni2_jax.audio import recordings
    from omni2_jax.generate.omni2 import join

    answers = out_dir / "answers.jsonl"
    if answers.exists():
        raise ValueError(f"{answers} exists already; give a new --out-dir")
    recordings.check_writable(
        next(parent for parent in answers.absolute().parents if parent.exists()) / answers.name
    )
    with console.status("loading"):
        model = load()
        model.voice(voice)  # one that does not exist is told before anything is written
    out_dir.mkdir(parents=True, exist_ok=True)
    progress = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=console,
    )
    with progress, open(answers, "w", encoding="utf-8") as file:
        task = progress.add_task("answering", total=len(items))
        for start in range(0, len(items), batch):
            group = items[start : start + batch]
            streams = model.streams([item.turns for item in group], voice, options, slots=batch)
            for item, replies in zip(group, streams, strict=True):
                answer = join(replies, wav)
                if wav:
                    save_speech(out_dir / f"{item.name}.wav", answer.waveform)
                line = {
                    "question_id": item.id,
                    "prediction": answer.text.strip(),
                    "prediction_units": answer.unit_text,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                progress.console.print(
                    f"{item.name}: {answer.text.strip()}", markup=False, highlight=False
                )
                progress.advance(task)

"""`omni2 chat`: answer the spoken turns of one conversation, or the questions of a file."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.text
import typer

from omni2_jax.cli.chat_questions import answer_questions, check_prompts, save_speech
from omni2_jax.cli.mesh import Mesh
from omni2_jax.cli.paths import Checkpoint, chosen
from omni2_jax.console import console, say
from omni2_jax.generate.options import LIMITS, Options
from omni2_jax.generate.timing import Timing, timed_replies

if TYPE_CHECKING:
    from omni2_jax.generate.prompts import Sound
    from omni2_jax.generate.session import Reply, Session

DEFAULTS = Options()


def number(name: str, help: str) -> Any:
    """The command-line option for a number of `Options`, with its limits."""
    low, high = LIMITS[name]
    return typer.Option(help=help, min=low, max=high)


UnitTemperature = Annotated[
    float | None,
    number(
        "unit_temperature",
        "Of the speech units; 0 is greedy, which tends to repeat itself. "
        "[default: the checkpoint's, or 1]",
    ),
]


def chat(
    wavs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="QUESTION.wav ...", help="Spoken turns of one conversation."),
    ] = None,
    checkpoint: Checkpoint = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Take the question from the microphone; it ends with silence, or with Enter.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the spoken answer here; with several turns to NAME-1.wav, NAME-2.wav ..."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Answer every item of a questions.json (the released format)."),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(help="With --questions: where answers.jsonl and ID.wav are written."),
    ] = None,
    no_wav: Annotated[
        bool, typer.Option("--no-wav", help="Text and units only, no audio.")
    ] = False,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only", help="Text alone: neither the speech LM nor the decoder is needed."
        ),
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="With --questions: how many to answer at the same time.")
    ] = 1,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Write the audio while it is generated (--out - is raw 16-bit PCM on stdout), "
            "and print timings.",
        ),
    ] = False,
    voice: Annotated[
        str | None,
        typer.Option(
            help="A stored voice, or a sound file to speak like. [default: the first stored]"
        ),
    ] = None,
    temperature: Annotated[
        float, number("temperature", "Of the text; 0 is greedy.")
    ] = DEFAULTS.temperature,
    top_p: Annotated[
        float | None,
        number("top_p", "Sample among the most likely text tokens of this total probability."),
    ] = DEFAULTS.top_p,
    top_k: Annotated[
        int | None, number("top_k", "Sample among the K most likely text tokens; 0 is off.")
    ] = DEFAULTS.top_k,
    repetition_penalty: Annotated[
        float | None,
        number("repetition_penalty", "Above 1: repeated text tokens become less likely."),
    ] = DEFAULTS.repetition_penalty,
    max_new_tokens: Annotated[
        int, number("max_new_tokens", "Text tokens at most.")
    ] = DEFAULTS.max_new_tokens,
    unit_temperature: UnitTemperature = DEFAULTS.unit_temperature,
    unit_vocabulary: Annotated[
        str,
        typer.Option(
            help="units: only speech units can be sampled; all: any token, as in the released code."
        ),
    ] = DEFAULTS.unit_vocabulary,
    max_flush_units: Annotated[
        int, number("max_flush_units", "Speech tokens at most after the end of the text.")
    ] = DEFAULTS.max_flush_units,
    seed: Annotated[int, number("seed", "The same seed gives the same answer.")] = DEFAULTS.seed,
    chunk: Annotated[
        int | None,
        number(
            "chunk",
            "Units in a chunk of the flow, which see one another; fewer cost less. "
            "[default: the checkpoint's]",
        ),
    ] = DEFAULTS.chunk,
    left_chunks: Annotated[
        int,
        typer.Option(
            min=-1,
            max=LIMITS["left_chunks"][1],
            help="Chunks that the flow sees before its own; -1: all, as in the released code.",
        ),
    ] = -1 if DEFAULTS.left_chunks is None else DEFAULTS.left_chunks,
    flow_cache_dtype: Annotated[
        str,
        typer.Option(
            help="float32, or bfloat16 to halve the memory of the flow's KV cache; "
            "on a GPU nearly all of it is always bfloat16."
        ),
    ] = DEFAULTS.flow_cache_dtype,
    no_seamless: Annotated[
        bool,
        typer.Option(
            "--no-seamless",
            help="Join the waveforms of two steps as the released code does, with small jumps.",
        ),
    ] = False,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="Cut turns that are longer than the speech encoder's window, 30 s as released. "
            "They are refused otherwise.",
        ),
    ] = False,
    split_long: Annotated[
        bool,
        typer.Option(
            "--split-long",
            help="Split turns that are longer than the window into several segments.",
        ),
    ] = False,
    mesh: Mesh = None,
) -> None:
    """Answer spoken questions in text and speech."""
    from omni2_jax.config import Omni2Config
    from omni2_jax.generate.omni2 import Omni2
    from omni2_jax.generate.questions import read_questions
    from omni2_jax.sharding import parse_mesh

    if truncate and split_long:
        raise ValueError("--truncate and --split-long exclude each other")
    if record and (wavs or questions):
        raise ValueError("--record takes neither wav files nor --questions")
    checkpoint = chosen(checkpoint)
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
        flow_cache_dtype=flow_cache_dtype,
        seamless=not no_seamless,
        long_turns="truncate" if truncate else "split" if split_long else "refuse",
    )
    no_wav = no_wav or text_only
    load = functools.partial(
        Omni2.load,
        checkpoint,
        decoder=not no_wav,
        mesh=parse_mesh(mesh) if mesh else None,
        speech=not text_only,
    )
    if questions:
        if wavs or out or stream or out_dir is None:
            raise ValueError(
                "--questions takes --out-dir, and neither wav files, --out nor --stream"
            )
        window = Omni2Config.load(checkpoint / "config.json").segment_samples
        items = read_questions(questions, options.long_turns, window)
        check_prompts(checkpoint, not no_wav, not text_only, items, options)
        answer_questions(load, items, out_dir, not no_wav, batch, voice, options)
        return
    if not wavs and not record:
        raise ValueError(
            "nothing to answer: give wav files, --record, or --questions with --out-dir"
        )
    if str(out) == "-" and not stream:
        raise ValueError("--out - needs --stream")
    if out and no_wav:
        option = "--text-only" if text_only else "--no-wav"
        raise ValueError(f"--out and {option} exclude each other")
    from omni2_jax.audio import recordings

    # A bad file, or no microphone, is reported before minutes are spent on the others.
    window = Omni2Config.load(checkpoint / "config.json").segment_samples
    segments = sum(len(recordings.load_turn(wav, options.long_turns, window)) for wav in wavs or ())
    if record:
        from omni2_jax.cli import microphone

        microphone.open_sounddevice()
    turns = len(wavs or ("recorded",))
    outs = targets(out, turns)
    with console.status("loading"):
        model = load()
        session = model.session(voice, options, turns=turns, segments=segments)
    sounds: list[Sound] = [*(wavs or ())]
    if record:
        with console.status("compiling"):
            session.engine.warm_up()
        sounds = [microphone.record(window / recordings.INPUT_RATE)]
    if stream:
        converse_aloud(session, sounds, outs)
    else:
        converse(session, sounds, outs)


def targets(out: Path | None, turns: int) -> list[Path | None]:
    """The output file of every turn. Raises ValueError unless all of them can be written."""
    from omni2_jax.audio import recordings

    if out is None or str(out) == "-":
        return [out] * turns
    outs = [out]
    if turns > 1:
        outs = [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(turns)]
    for path in outs:
        recordings.check_writable(path)
    return [*outs]


def converse(session: "Session", wavs: "list[Sound]", outs: list[Path | None]) -> None:
    """Answer one turn after the other and print the text while it is generated."""
    from omni2_jax.audio import recordings
    from omni2_jax.generate.omni2 import join

    for wav, out in zip(wavs, outs, strict=True):
        if len(wavs) > 1:
            console.print(rich.text.Text(str(wav), "bold"), soft_wrap=True)
        answer = join(print_text(session.respond(wav), sys.stdout), spoken=True)
        assert answer.waveform is not None
        is_saved = out is not None and save_speech(out, answer.waveform)
        seconds = answer.waveform.size / recordings.OUTPUT_RATE
        speech = f", {seconds:.2f} s of speech" if seconds else ""  # none with --no-wav
        if session.engine.config.speech_lm:
            say(f"{len(answer.units)} units{speech}" + (f" -> {out}" if is_saved else ""))


def print_text(replies: "Iterator[Reply]", file) -> "Iterator[Reply]":
    """The same replies; the text of each one is printed when it is taken."""
    for reply in replies:
        print(reply.text, end="", flush=True, file=file)
        yield reply
    print(file=file)


def converse_aloud(session: "Session", wavs: "list[Sound]", outs: list[Path | None]) -> None:
    """Answer one turn after the other, write samples while they are generated, print timings."""
    from omni2_jax.audio import recordings

    with console.status("compiling"):
        session.engine.warm_up()
        session.hear(wavs[0])
    for wav, out in zip(wavs, outs, strict=True):
        timing = Timing()
        text_file = sys.stderr if str(out) == "-" else sys.stdout
        with recordings.WavWriter(out) as writer:
            for reply in print_text(timed_replies(session, wav, timing), text_file):
                writer.write(reply.samples)
                timing.end_step(len(reply.samples) / recordings.OUTPUT_RATE)
        console.print(timing.table())

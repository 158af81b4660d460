"""`omni2 speak`: say a text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.chat import DEFAULTS, UnitTemperature, number
from omni2_jax.cli.paths import Checkpoint, chosen
from omni2_jax.console import console, progress_bar, say


def speak(
    text: Annotated[str, typer.Argument(help="What to say; - reads it from stdin.")],
    out: Annotated[
        Path, typer.Option(help="The wav to write; - is raw 16-bit PCM on stdout, 24 kHz.")
    ],
    checkpoint: Checkpoint = None,
    voice: Annotated[
        str | None,
        typer.Option(
            help="A stored voice, or a sound file to speak like. [default: the first stored]"
        ),
    ] = None,
    unit_temperature: UnitTemperature = DEFAULTS.unit_temperature,
    max_flush_units: Annotated[
        int, number("max_flush_units", "Speech tokens at most after the end of the text.")
    ] = DEFAULTS.max_flush_units,
    seed: Annotated[int, number("seed", "The same seed gives the same speech.")] = DEFAULTS.seed,
) -> None:
    """Say a text in the model's voice: its LLM is made to answer with it."""
    from omni2_jax.audio import recordings
    from omni2_jax.generate.omni2 import SAID_NOTHING, Omni2, describe
    from omni2_jax.generate.options import Options
    from omni2_jax.generate.prompts import forced_ids

    checkpoint = chosen(checkpoint)
    text = sys.stdin.read() if text == "-" else text
    # A bad text is reported before the parameters are read.
    forced_ids(describe(checkpoint, decoder=True)[1], text)
    options = Options(unit_temperature=unit_temperature, max_flush_units=max_flush_units, seed=seed)
    num_samples = 0
    with recordings.WavWriter(out) as writer:
        with console.status("loading"):
            model = Omni2.load(checkpoint)
            replies = model.stream_speech(text, voice, options)
        with progress_bar("{task.fields[seconds]:.1f} s of speech") as progress:
            said = progress.add_task("speaking", total=len(text.strip()), seconds=0)
            for reply in replies:
                writer.write(reply.samples)
                num_samples += reply.samples.size
                seconds = num_samples / recordings.OUTPUT_RATE
                progress.update(said, advance=len(reply.text), seconds=seconds)
        if not num_samples:
            raise ValueError(SAID_NOTHING)
    if str(out) != "-":
        say(f"{num_samples / recordings.OUTPUT_RATE:.2f} s of speech -> {out}")

"""`omni2 join`: parts of several checkpoints as one."""

from pathlib import Path
from typing import Annotated, Literal

import rich.progress
import typer

from omni2_jax import files
from omni2_jax.cli.convert import Quantize
from omni2_jax.cli.paths import directory
from omni2_jax.console import console, progress_bar, say


def join(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[PART,...=]CKPT ...",
            help="Checkpoints, and the parts that are taken from them, as "
            "language=runs/2/final flow=runs/flow/final; `language` and `decoder` stand for all of "
            "them. Without parts: all that no other source is named for.",
        ),
    ],
    out: Annotated[Path, typer.Option(parser=directory, help="The checkpoint to make.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="The type that parameters are stored in. [default: as they are]"),
    ] = None,
    quantize: Quantize = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Store int8 matrices as the float32 numbers that they stand for, so that the "
            "checkpoint can be trained.",
        ),
    ] = False,
    speech_lm_from_llm: Annotated[
        bool,
        typer.Option(
            "--speech-lm-from-llm",
            help="The speech LM starts as a copy of the LLM, with new rows for the units, to be "
            "trained in stage 1b.",
        ),
    ] = False,
    no_fusion: Annotated[
        bool,
        typer.Option(
            "--no-fusion",
            help="The speech LM reads the text alone, without the LLM's hidden states, as it has "
            "learnt to in stage 1b.",
        ),
    ] = False,
) -> None:
    """Make one checkpoint of parts that were trained apart; store them in another type.

    Parts that do not fit one another are refused: by units, mel bands, sizes, and tokenizers.
    """
    from omni2_jax.checkpoint import parameters
    from omni2_jax.convert import precision, speech_lm, write
    from omni2_jax.convert.join import Source
    from omni2_jax.convert.join import join as join_parts

    if quantize and dequantize:
        raise ValueError("--quantize and --dequantize exclude each other; give one of them")
    files.check_new(out)
    with console.status("checking names and shapes"):
        release = join_parts([Source.parse(text) for text in sources], fusion=not no_fusion)
        if dequantize:
            release = precision.dequantized(release)
        if speech_lm_from_llm:
            release = speech_lm.from_llm(release)
        if dtype:
            release = precision.stored_as(release, dtype)
        if quantize:
            release = precision.quantized(release)
    with progress_bar(rich.progress.DownloadColumn()) as progress:
        task = progress.add_task("writing", total=release.nbytes)
        write.write(out, release, {}, lambda leaf: progress.advance(task, leaf.nbytes))
    parts = ", ".join(parameters.parts(out))
    say(f"wrote {out}: {parts} ({release.nbytes / 1e6:,.1f} MB)")

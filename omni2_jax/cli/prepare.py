"""`omni2 prepare`: recorded dialogues, however they are kept, become a data set to train on."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    source: Annotated[
        Path,
        typer.Option(
            help="A questions.json, a .jsonl or a folder with data.jsonl, or InstructS2S-200K's JSON."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The data set to make: a new directory.")],
    format: Annotated[
        str | None,
        typer.Option(help="questions, jsonl or instructs2s; inferred from the file otherwise."),
    ] = None,
    speech_tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint with a speech tokenizer, for replies without units.", metavar="CKPT"
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first dialogue that cannot be used.")
    ] = False,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of the data set's files.")] = 512,
    batch: Annotated[
        int, typer.Option(min=1, help="Recordings that the speech tokenizer hears at once.")
    ] = 16,
) -> None:
    """Make a data set of spoken dialogues."""
    from omni2_jax.train.data import prepare

    prepare.prepare(source, out, format, speech_tokenizer, strict, shard_mb, batch)

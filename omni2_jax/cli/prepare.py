"""`omni2 prepare`: makes a data set to train on from recorded dialogues."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.paths import directory
from omni2_jax.cli.where import RayGpusOption, RayOption, ShardOption, WorkersOption
from omni2_jax.jobs.where import Where


def prepare(
    source: Annotated[
        Path,
        typer.Option(
            help="A questions.json, a .jsonl, a folder with data.jsonl, InstructS2S-200K's JSON, "
            "VocalNet's JSON, SLAM-Omni's .jsonl, parquet files with recordings inside, or a "
            "folder of a voice's recordings with metadata.jsonl: lines of {audio, text}."
        ),
    ],
    out: Annotated[
        Path, typer.Option(parser=directory, help="The data set to make: a new directory.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="questions, jsonl, recordings, instructs2s, vocalnet, slam or parquet. [default: "
            "inferred from the file]"
        ),
    ] = None,
    speech_tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint with a speech tokenizer, which makes units of recorded replies "
            "that bring none.",
            parser=directory,
            metavar="CKPT",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail at the first dialogue that cannot be used, instead of leaving it out.",
        ),
    ] = False,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Approximate size of the data set's files, in MB.")
    ] = 512,
    batch: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="Recordings that the speech tokenizer processes at once."
        ),
    ] = 16,
    max_seconds: Annotated[
        float, typer.Option(help="Leave out dialogues with a longer recording.")
    ] = 600,
    split: Annotated[
        str | None,
        typer.Option(help='Only what states this "split", as train or test. [default: all]'),
    ] = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    shard: ShardOption = None,
    ray_gpus: RayGpusOption = 0,
) -> None:
    """Make a data set of spoken dialogues, or of a voice's recordings with their text.

    Dialogues that cannot be used are left out and named. A command that was killed goes on where it
    stopped; its work is kept in OUT.work.
    """
    from omni2_jax.train.data import prepare

    prepare.prepare(
        source,
        out,
        format,
        speech_tokenizer,
        strict,
        shard_mb,
        batch,
        max_seconds,
        split,
        Where(workers, ray, shard, ray_gpus),
    )

"""`omni2 synthesize speech`: recordings of dialogues."""

import os
from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.no_effect import refuse
from omni2_jax.cli.paths import directory
from omni2_jax.cli.recogniser import LanguageOption, RecogniserModelOption, RecogniserOption
from omni2_jax.cli.where import RayGpusOption, RayOption, ShardOption, WorkersOption


def speech(
    context: typer.Context,
    dialogues: Annotated[
        Path,
        typer.Option(
            help="The .jsonl file of `omni2 synthesize dialogues`; or a .txt file of sentences, "
            "for recordings of the voice of the replies."
        ),
    ],
    voices: Annotated[
        Path,
        typer.Option(help="The engines and voices in YAML, such as recipes/nano/voices.yaml."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory,
            help="The directory for recordings and manifests. The same command goes on where it "
            "stopped.",
        ),
    ],
    reply_voice: Annotated[
        str | None,
        typer.Option(help="The voice of all replies. [default: as in the voices file]"),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(min=0, max=0.5, help='The share of "seen" dialogues for the validation.'),
    ] = 0.01,
    test: Annotated[
        float,
        typer.Option(
            min=0, max=0.5, help='The share of "seen" dialogues for the test, in held-out voices.'
        ),
    ] = 0.01,
    attempts: Annotated[
        int, typer.Option(min=1, max=20, help="How often a clip that fails a check is made.")
    ] = 3,
    recogniser: RecogniserOption = None,
    recogniser_model: RecogniserModelOption = "whisper-1",
    language: LanguageOption = "en",
    max_wer: Annotated[
        float, typer.Option(min=0, help="Errors per word that the recogniser may hear in a clip.")
    ] = 0.5,
    replies: Annotated[
        bool,
        typer.Option(
            "--replies/--no-replies",
            help="Without replies, they stay text: stage 1a needs no more.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of voices and augmentation.")] = 0,
    workers: WorkersOption = None,
    ray: RayOption = None,
    shard: ShardOption = None,
    ray_gpus: RayGpusOption = 0,
) -> None:
    """Speak dialogues: recordings, and manifests that `omni2 prepare` and `omni2 evaluate` read.

    A voice is drawn for the questions of each dialogue; one voice speaks all replies. Every clip is
    checked, and made again if it fails. Dialogues that cannot be spoken are left out and named.
    """
    from omni2_jax.jobs import Where
    from omni2_jax.synthesize import make_speech
    from omni2_jax.synthesize.speaker import SpeakerOptions
    from omni2_jax.synthesize.voices import read_voices

    if make_speech.holds_sentences(dialogues):
        names = ("replies", "validation", "test")
        refuse(context, names, f"for dialogues only, and {dialogues} is a file of sentences")
    make_speech.synthesize_speech(
        dialogues,
        read_voices(voices, reply_voice),
        out,
        SpeakerOptions(seed, attempts, recogniser, recogniser_model, language, max_wer, replies),
        make_speech.Shares(validation, test),
        Where(workers, ray, shard, ray_gpus),
        workers=os.cpu_count() or 1,
    )

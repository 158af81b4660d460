"""Options of commands that let a recogniser hear recordings (`omni2_jax.recognisers`)."""

from typing import Annotated

import typer

RecogniserOption = Annotated[
    str | None,
    typer.Option(
        "--recogniser",
        help="It hears what was said: a Whisper model of faster-whisper (a directory or a Hugging "
        "Face id), or the URL of audio transcriptions, http://HOST/v1.",
    ),
]
RecogniserModelOption = Annotated[
    str, typer.Option("--recogniser-model", help="The model's name, for a recogniser at a URL.")
]
LanguageOption = Annotated[
    str, typer.Option("--language", help="The language of what the recogniser hears, as en.")
]

"""`omni2 new`: a checkpoint of any dimensions with fresh parameters, to train from nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.progress
import typer

from omni2_jax import files
from omni2_jax.cli.convert import SOURCE, Sources, read
from omni2_jax.cli.paths import directory
from omni2_jax.console import console, progress_bar, say

if TYPE_CHECKING:
    from omni2_jax.convert.release import Release


def new(
    config: Annotated[
        str,
        typer.Option(
            help="A Python file that defines `config`, an Omni2Config, and for a speech tokenizer "
            "`speech_tokenizer`, a SpeechTokenizerConfig; or the name of a shipped one. The ids of "
            "special tokens and the speech LM's vocabulary follow from the tokenizer."
        ),
    ],
    out: Annotated[Path, typer.Option(parser=directory, help="The checkpoint to make.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="What the tokenizer is learnt from, a byte-level BPE of llm.vocabulary tokens: a "
            "text file, or a .jsonl of dialogues."
        ),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="PART,...",
            help="The fresh parts. [default: all that the config describes and no option gives]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the fresh parameters.")] = 0,
    whisper: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE,
            help="A Whisper of any size as the speech encoder, its window cut to the config's "
            "`frames`.",
        ),
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar=SOURCE, help="As for `omni2 convert`.")] = None,
    speech_lm: Annotated[
        str | None, typer.Option(metavar=SOURCE, help="As for `omni2 convert`.")
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(metavar=SOURCE, help="As for `omni2 convert`.")
    ] = None,
    speech_tokenizer: Annotated[
        str | None, typer.Option(metavar=SOURCE, help="As for `omni2 convert`.")
    ] = None,
) -> None:
    """Make a checkpoint of any dimensions to train from nothing.

    Parts that an option gives are taken as they are; the others get random parameters.
    """
    from omni2_jax.convert import new, write

    design = new.Design.read(config)
    chosen = [part.strip() for part in (parts or "").split(",") if part.strip()]
    sources = Sources.find(None, decoder, whisper, llm, speech_lm, speech_tokenizer)
    files.check_new(out)
    with console.status("checking names and shapes"):
        release = new.make(design, given(sources), chosen, text, tokenizer_of(sources), seed)
    with progress_bar(rich.progress.DownloadColumn()) as progress:
        task = progress.add_task("writing", total=release.nbytes)
        write.write(out, release, {}, lambda leaf: progress.advance(task, leaf.nbytes))
    fresh = [part for part in new.ALL_PARTS if part in release.params]
    say(f"wrote {out}: {', '.join(fresh)}")


def given(sources: Sources) -> "Release":
    """What the sources hold together; nothing without a source."""
    from omni2_jax.convert.hugging_face import EMPTY_CONFIG
    from omni2_jax.convert.release import Release

    return read(sources, new_parts=False) or Release(EMPTY_CONFIG)


def tokenizer_of(sources: Sources):
    """The tokenizer of the LLM among the sources; None if there is no LLM."""
    if sources.llm is None:
        return None
    from omni2_jax.convert import vocabulary

    return vocabulary.read(sources.llm)

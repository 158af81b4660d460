"""`omni2 convert`: PyTorch, Hugging Face and ONNX weights become one checkpoint, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import rich.progress
import typer

from omni2_jax.cli.paths import directory
from omni2_jax.console import console, progress_bar, say

if TYPE_CHECKING:
    from omni2_jax.convert.release import Release


@dataclass(frozen=True)
class Sources:
    """The local paths of the sources, None for those that are not given."""

    omni2: Path | None
    decoder: Path | None
    whisper: Path | None
    llm: Path | None
    speech_lm: Path | None
    speech_tokenizer: Path | None

    @classmethod
    def find(
        cls,
        omni2: str | None,
        decoder: str | None,
        whisper: str | None,
        llm: str | None,
        speech_lm: str | None,
        speech_tokenizer: str | None,
    ) -> "Sources":
        """Local paths as they are, and the files of Hugging Face repositories in its cache.

        Raises ValueError naming a source that is neither, or cannot be downloaded.
        """
        from omni2_jax import hub

        if speech_lm and not llm:
            raise ValueError("--speech-lm needs --llm: the speech LM reads the tokens of that LLM")
        return cls(
            omni2=hub.local_path(omni2, hub.OMNI2),
            decoder=hub.local_path(decoder, hub.DECODER),
            whisper=hub.local_path(whisper, hub.WHISPER),
            llm=hub.local_path(llm, hub.LLM),
            speech_lm=hub.local_path(speech_lm, hub.LLM),
            speech_tokenizer=hub.local_path(speech_tokenizer, hub.SPEECH_TOKENIZER),
        )


SOURCE = "PATH|ID"
Quantize = Annotated[
    Literal["int8"] | None,
    typer.Option(
        help="Store the matrices of both language models and the speech encoder as int8, in half "
        "the size. Such a checkpoint answers, but is not trained."
    ),
]


def convert(
    out: Annotated[
        Path,
        typer.Option(
            parser=directory,
            help="The checkpoint to make, or to add missing parts and voices to; "
            "with --to-torch, the release to make.",
        ),
    ],
    omni2: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE, help="A LLaMA-Omni2 release: config.json, safetensors, tokenizers."
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE, help="A cosy2_decoder: cosyvoice.yaml, flow.pt, hift.pt, campplus.onnx."
        ),
    ] = None,
    whisper: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE,
            help="An OpenAI Whisper .pt, or a Hugging Face or CTranslate2 Whisper directory.",
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm",
            "--qwen",
            metavar=SOURCE,
            help="A plain Hugging Face directory of a Qwen2.5 or a Qwen3.",
        ),
    ] = None,
    speech_lm: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE,
            help="With --llm: a small one with tied embeddings and the same tokenizer, "
            "such as Qwen2.5-0.5B, to become the speech LM.",
        ),
    ] = None,
    speech_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE, help="speech_tokenizer_v2.onnx, or s3tokenizer's .pt or .safetensors."
        ),
    ] = None,
    voice: Annotated[
        list[str] | None,
        typer.Option(help="A voice to speak with (repeatable).", metavar="NAME=prompt.wav"),
    ] = None,
    to_torch: Annotated[
        Path | None,
        typer.Option(
            parser=directory, help="A checkpoint to write back in the released PyTorch layout."
        ),
    ] = None,
    quantize: Quantize = None,
) -> None:
    """Convert released weights into a checkpoint, or a checkpoint back into the released layout.

    A source is a local path, or the id of a Hugging Face repository: ORG/NAME or ORG/NAME@REVISION.
    """
    names = (omni2, decoder, whisper, llm, speech_lm, speech_tokenizer)
    if to_torch is None:
        prompts = dict(parse_voice(text) for text in voice or [])
        to_checkpoint(out, Sources.find(*names), prompts, quantize)
    elif any(names) or voice or quantize:
        raise ValueError("--to-torch takes --out and nothing else")
    elif not to_torch.exists():
        raise ValueError(f"{to_torch} does not exist")
    else:
        to_release(to_torch, out)


def to_checkpoint(
    out: Path, sources: Sources, prompts: dict[str, Path], quantize: str | None = None
) -> None:
    """Convert the sources into the checkpoint `out`, or add them to it. Raises ValueError."""
    from omni2_jax.checkpoint import parameters, voices
    from omni2_jax.convert import precision, write

    extends = (out / "config.json").exists()
    with console.status("checking names and shapes"):
        release = read(sources)
        if quantize:
            if release is None:
                raise ValueError("--quantize needs weights to convert, as with --omni2")
            release = precision.quantized(release)
    if release is None and not prompts:
        raise ValueError(
            "nothing to convert: give --omni2, --decoder, --whisper, --llm, --speech-tokenizer, "
            "--voice or --to-torch"
        )
    if release is None and not extends:
        raise ValueError(f"{out} is not a checkpoint, so there is nothing to add a voice to")
    with progress_bar(rich.progress.DownloadColumn()) as progress:
        total = release.nbytes if release else 0
        task = progress.add_task("writing", total=total, visible=release is not None)

        def advance(leaf) -> None:
            progress.advance(task, leaf.nbytes)

        if extends:
            write.extend(out, release, prompts, advance)
        elif release:
            write.write(out, release, prompts, advance)
    parts = parameters.parts(out)
    say(f"wrote {out}: {', '.join(parts)}")
    if "flow" in parts:
        none = f"none; add one with omni2 convert --voice NAME=prompt.wav --out {out}"
        say(f"voices: {', '.join(voices.names(out)) or none}")


def to_release(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint in the released layout. Raises ValueError."""
    from omni2_jax.convert import export

    with progress_bar(rich.progress.DownloadColumn()) as progress:
        export.write(checkpoint, out, progress)
    say(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def read(sources: Sources, new_parts: bool = True) -> "Release | None":
    """What the sources hold together, checked but not read; None without a source.

    new_parts: with the new adapter and gate fusion that training starts from. Raises ValueError
    naming the file and what is wrong with it.
    """
    from omni2_jax.convert import read
    from omni2_jax.convert.release import combine, merged

    releases = []
    if sources.omni2:
        releases.append(read.read_omni2(sources.omni2, sources.whisper))
    elif sources.whisper:
        releases.append(read.read_whisper(sources.whisper))
    if sources.llm:
        releases.append(read.read_llm(sources.llm, sources.speech_lm))
    if sources.decoder:
        releases.append(read.read_decoder(sources.decoder))
    if sources.speech_tokenizer:
        releases.append(read.read_speech_tokenizer(sources.speech_tokenizer))
    if not releases:
        return None
    return combine(releases) if new_parts else merged(releases)


def parse_voice(text: str) -> tuple[str, Path]:
    """The name and the file of NAME=prompt.wav.

    A bad sound file is refused here, before minutes are spent on the weights.
    Raises ValueError if the text has another form or the file is no sound.
    """
    from omni2_jax.audio import recordings
    from omni2_jax.convert.read import check_voice_name

    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f"--voice {text!r}: expected NAME=prompt.wav")
    check_voice_name(name, "--voice")
    if not path.endswith(".npy"):
        recordings.load_turn(path, "truncate")
    return name, Path(path)

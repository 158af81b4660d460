"""`omni2 convert`: PyTorch, Hugging Face and ONNX weights become one checkpoint directory, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.progress
import typer

from omni2_jax.cli.console import console, progress_bar, say

if TYPE_CHECKING:
    from omni2_jax.convert import build


def convert(
    out: Annotated[
        Path,
        typer.Option(
            help="The checkpoint to make, or to add missing parts and voices to; with --to-torch the release."
        ),
    ],
    omni2: Annotated[
        Path | None,
        typer.Option(help="A LLaMA-Omni2 release: config.json, safetensors, tokenizers."),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(help="A cosy2_decoder: cosyvoice.yaml, flow.pt, hift.pt, campplus.onnx."),
    ] = None,
    whisper: Annotated[
        Path | None, typer.Option(help="An OpenAI Whisper .pt or a Hugging Face Whisper directory.")
    ] = None,
    qwen: Annotated[
        Path | None, typer.Option(help="A plain Hugging Face Qwen2.5 directory.")
    ] = None,
    speech_lm: Annotated[
        Path | None,
        typer.Option(help="With --qwen: a plain Qwen2.5-0.5B directory to become the speech LM."),
    ] = None,
    speech_tokenizer: Annotated[
        Path | None,
        typer.Option(help="speech_tokenizer_v2.onnx, or s3tokenizer's .pt or .safetensors."),
    ] = None,
    voice: Annotated[
        list[str] | None,
        typer.Option(help="Store a voice to speak with (repeatable).", metavar="NAME=prompt.wav"),
    ] = None,
    to_torch: Annotated[
        Path | None, typer.Option(help="A checkpoint to write back in the released PyTorch layout.")
    ] = None,
) -> None:
    """Convert released weights into a checkpoint, or a checkpoint back into the released layout."""
    from omni2_jax.checkpoint import parameters, voices
    from omni2_jax.convert import build, export

    for path in filter(
        None, (omni2, decoder, whisper, qwen, speech_lm, speech_tokenizer, to_torch)
    ):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if to_torch is not None:
        if any((omni2, decoder, whisper, qwen, speech_lm, speech_tokenizer, voice)):
            raise ValueError("--to-torch takes --out and nothing else")
        with progress_bar(rich.progress.DownloadColumn()) as progress:
            export.write(to_torch, out, progress)
        say(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
        return
    prompts = dict(parse_voice(text) for text in voice or [])
    extends = (out / "config.json").exists()
    with console.status("checking names and shapes"):
        release = read(omni2, decoder, whisper, qwen, speech_lm, speech_tokenizer)
    if release is None and not prompts:
        raise ValueError(
            "nothing to convert: give --omni2, --decoder, --whisper, --qwen, --speech-tokenizer, --voice or --to-torch"
        )
    if release is None and not extends:
        raise ValueError(f"{out} is not a checkpoint, so there is nothing to add a voice to")
    with progress_bar(rich.progress.DownloadColumn()) as progress:
        task = progress.add_task(
            "writing", total=release and total_bytes(release), visible=release is not None
        )
        (build.extend if extends else build.write)(
            out, release, prompts, lambda leaf: progress.advance(task, leaf.nbytes)
        )
    say(f"wrote {out}: {', '.join(parameters.parts(out))}")
    if "flow" in parameters.parts(out):
        say(
            f"voices: {', '.join(voices.names(out)) or f'none; add one with omni2 convert --voice NAME=prompt.wav --out {out}'}"
        )


def read(
    omni2: Path | None,
    decoder: Path | None,
    whisper: Path | None,
    qwen: Path | None,
    speech_lm: Path | None,
    speech_tokenizer: Path | None,
) -> "build.Release | None":
    """What the given sources hold together, checked but not read; None without a source."""
    from omni2_jax.convert import build

    if speech_lm and not qwen:
        raise ValueError("--speech-lm needs --qwen: the speech LM reads the tokens of that LLM")
    given = []
    if omni2:
        given.append(build.read_omni2(omni2, whisper))
    elif whisper:
        given.append(build.read_whisper(whisper))
    given += [build.read_qwen(qwen, speech_lm)] if qwen else []
    given += [build.read_decoder(decoder)] if decoder else []
    given += [build.read_speech_tokenizer(speech_tokenizer)] if speech_tokenizer else []
    return build.combine(given) if given else None


def total_bytes(release: "build.Release") -> int:
    from omni2_jax.checkpoint import parameters

    return sum(
        leaf.nbytes
        for params in release.params.values()
        for leaf in parameters.flatten(params).values()
    )


def parse_voice(text: str) -> tuple[str, Path]:
    from omni2_jax.audio import recordings
    from omni2_jax.convert import build

    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f"--voice {text!r}: expected NAME=prompt.wav")
    build.check_name(name, "--voice")
    if not path.endswith(".npy"):
        recordings.load(path)  # a bad file is told before minutes are spent on the weights
    return name, Path(path)

"""`python -m convert`: PyTorch, Hugging Face and ONNX weights -> one checkpoint directory, and back."""

import math
import sys
from pathlib import Path
from typing import Annotated

import rich.console
import rich.progress
import typer

from convert import build, export
from omni2_jax import checkpoint

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
console = rich.console.Console(stderr=True)


@app.command()
def convert(
    out: Annotated[Path, typer.Option(help="The checkpoint directory to make (or to add missing parts and voices to); with --to-torch the release.")],
    omni2: Annotated[Path | None, typer.Option(help="A LLaMA-Omni2 release directory: config.json, safetensors, tokenizers.")] = None,
    decoder: Annotated[Path | None, typer.Option(help="A cosy2_decoder directory: cosyvoice.yaml, flow.pt, hift.pt, campplus.onnx.")] = None,
    whisper: Annotated[Path | None, typer.Option(help="An OpenAI Whisper .pt or a Hugging Face Whisper directory.")] = None,
    qwen: Annotated[Path | None, typer.Option(help="A plain Hugging Face Qwen2.5 directory.")] = None,
    voice: Annotated[list[str] | None, typer.Option(help="NAME=prompt.wav: store a voice to speak with (repeatable).", metavar="NAME=FILE")] = None,
    to_torch: Annotated[Path | None, typer.Option(help="A checkpoint directory to write back in the released PyTorch layout.")] = None,
) -> None:
    """Convert released weights into a checkpoint, or a checkpoint back into the released layout."""
    if to_torch is not None:
        if any((omni2, decoder, whisper, qwen, voice)):
            raise ValueError("--to-torch takes --out and nothing else")
        with bar() as progress:
            export.write(to_torch, out, progress)
        console.print(f"wrote {out}")
        return
    prompts = dict(parse_voice(text) for text in voice or [])
    given = []
    if omni2:
        given.append(build.read_omni2(omni2, whisper))
    elif whisper:
        given.append(build.read_whisper(whisper))
    given += [build.read_qwen(qwen)] if qwen else []
    given += [build.read_decoder(decoder)] if decoder else []
    if not given and not prompts:
        raise ValueError("nothing to convert: give --omni2, --decoder, --whisper, --qwen, --voice or --to-torch")
    release = build.combine(given) if given else None
    with bar() as progress:
        task = progress.add_task("writing", total=release and total_bytes(release))
        written = lambda leaf: progress.advance(task, nbytes(leaf))  # noqa: E731
        if (out / "config.json").exists():
            build.extend(out, release, prompts, written)
        elif release is None:
            raise ValueError(f"{out} is not a checkpoint, so there is nothing to add a voice to")
        else:
            build.write(out, release, prompts, written)
    console.print(f"wrote {out}: {', '.join(checkpoint.parts(out))}")


def bar() -> rich.progress.Progress:
    columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(), rich.progress.DownloadColumn())
    return rich.progress.Progress(*columns, rich.progress.TimeRemainingColumn(), console=console)


def nbytes(leaf: checkpoint.Unread) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.shape)


def total_bytes(release: build.Release) -> int:
    return sum(nbytes(leaf) for params in release.params.values() for leaf in checkpoint.flatten(params).values())


def parse_voice(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f"--voice {text!r}: expected NAME=prompt.wav")
    return name, Path(path)


def main() -> None:
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.spectra`: which part of the spectrum costs a vocoder its naturalness.

Recordings and their copies (the recording's mel -> wave) are cut into short spectra and put
together again from both: the magnitudes of one with the phases of the other, and the recording
below a frequency with the copy above it, and the other way round. If a mixture is rated as the
recording is, then what it has of the copy costs nothing. DNSMOS gives the ratings.

N samples at 24 kHz.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import rich.progress
import rich.table
import typer
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann

from omni2_jax.audio import recordings
from omni2_jax.cli.paths import directory
from omni2_jax.console import progress_bar, run_function
from omni2_jax.evaluate import estimates
from omni2_jax.evaluate.copies import UNIT_SAMPLES, CopyMaker
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item, read_items
from omni2_jax.evaluate.tasks.copy_synthesis import open_dnsmos

# A Hann window of 43 ms, every 11 ms.
TRANSFORM = ShortTimeFFT(hann(1024, sym=False), hop=256, fs=recordings.OUTPUT_RATE)


def mixtures(
    recording: np.ndarray, copy: np.ndarray, borders: Sequence[float]
) -> dict[str, np.ndarray]:
    """Two sounds [N], and what is put together from both of them [N], by its description.

    borders: frequencies in Hz, at which the spectra are divided.
    """
    own, made = TRANSFORM.stft(recording), TRANSFORM.stft(copy)  # [frequencies, frames]

    def phases(spectrum: np.ndarray) -> np.ndarray:
        return np.exp(1j * np.angle(spectrum))

    spectra = {
        "recording's magnitudes, copy's phases": np.abs(own) * phases(made),
        "copy's magnitudes, recording's phases": np.abs(made) * phases(own),
    }
    for border in borders:
        is_below = (TRANSFORM.f < border)[:, None]
        spectra[f"recording below {border:g} Hz, copy above"] = np.where(is_below, own, made)
        spectra[f"copy below {border:g} Hz, recording above"] = np.where(is_below, made, own)
    sounds = {"recording": recording, "copy": copy}
    for name, spectrum in spectra.items():
        sounds[name] = TRANSFORM.istft(spectrum, k1=len(recording)).astype(np.float32)
    return sounds


def load(item: Item) -> np.ndarray:
    """An item's recording, a whole number of units [N]."""
    path = item.turns[-1]
    if not isinstance(path, Path):
        raise ValueError(f"{item.context}: expected a recording")
    samples = recordings.load(path, recordings.OUTPUT_RATE)
    return samples[: len(samples) // UNIT_SAMPLES * UNIT_SAMPLES]


def ratings(
    items: Sequence[Item], maker: CopyMaker, borders: Sequence[float]
) -> Mapping[str, list[float]]:
    """DNSMOS OVRL of every mixture of every recording, by description. It shows a bar."""
    rate, found = open_dnsmos(), {}
    with progress_bar(rich.progress.MofNCompleteColumn()) as bar:
        for item in bar.track(items, description="rating"):
            recording = load(item)
            copy = maker(recording)["vocoder"].samples
            assert copy is not None
            for name, samples in mixtures(recording, copy, borders).items():
                found.setdefault(name, []).append(rate(samples))
    return found


def show(figures: Mapping[str, Estimate], title: str) -> None:
    """Print them as a table."""
    table = rich.table.Table("what is heard", "DNSMOS OVRL", "95 % interval", title=title)
    for name, figure in figures.items():
        table.add_row(name, f"{figure.value:.2f}", f"{figure.low:.2f} to {figure.high:.2f}")
    rich.console.Console().print(table)


def main(
    system: Annotated[Path, typer.Option(parser=directory, help="A checkpoint with a vocoder.")],
    data: Annotated[Path, typer.Option(help="Recordings, as `omni2 evaluate` reads them.")],
    limit: Annotated[int, typer.Option(min=1, help="The first so many recordings.")] = 20,
    below: Annotated[
        list[float] | None,
        typer.Option(min=1, help="Divide the spectra at so many Hz; may be repeated.  [700]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Rate mixtures of recordings and their copies by a vocoder."""
    maker = CopyMaker(system, vocoder_only=True)
    found = ratings(read_items(data, limit), maker, below or [700.0])
    figures = {name: estimates.mean(values) for name, values in found.items()}
    show(figures, f"{system}: {len(found['recording'])} recordings and their copies")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

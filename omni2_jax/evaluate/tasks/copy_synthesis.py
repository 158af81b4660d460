"""Copy synthesis: how much of a recording the decoder's parts keep (see evaluate/copies.py).

The "answer" is the recording itself. Each path through the parts is compared with it: words by a
recogniser, quality by DNSMOS, mel frames, and the fundamental frequency. OUT/copies holds the
copies as wavs, and pictures of the first ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from omni2_jax import jobs
from omni2_jax.audio import features, pitch, recordings
from omni2_jax.checkpoint import voices
from omni2_jax.console import say
from omni2_jax.evaluate import copies, estimates, word_errors
from omni2_jax.evaluate.copies import UNIT_SAMPLES, Copy, CopyMaker
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task, TaskOptions

DRAWN = 4  # recordings whose spectrograms are drawn


MEASURES = {  # of each path
    "recording": ("wer", "dnsmos"),
    "vocoder": ("wer", "wer_above", "dnsmos", "mel", "f0", "voicing", "real_time"),
    "flow": ("mel",),
    "chain": ("wer", "wer_above", "dnsmos", "mel", "f0", "voicing", "real_time"),
}
KINDS = {  # title, unit, digits, what is better
    "wer": ("WER", "%", 1, "low"),
    "wer_above": ("WER above the recording's", "points", 1, "low"),
    "dnsmos": ("DNSMOS OVRL", "", 2, "high"),
    "mel": ("mel distance", "nepers", 3, "low"),
    "f0": ("median F0 error", "Hz", 2, "low"),
    "voicing": ("voicing errors", "%", 1, "low"),
    "real_time": ("real-time factor", "", 3, "low"),
}


def metrics_of_paths() -> dict[str, Metric]:
    """The metrics by name, PATH_MEASURE."""
    return {
        f"{path}_{name}": Metric(f"{path}: {KINDS[name][0]}", *KINDS[name][1:])
        for path, names in MEASURES.items()
        for name in names
    }


class CopySynthesis(Task):
    """Copies of every recording. Paths whose parts the checkpoint lacks are left out."""

    needs_questions = True
    needs_samples = True
    workers = 1  # the recogniser and XLA use all cores themselves
    hears = True
    metrics: ClassVar[Mapping[str, Metric]] = metrics_of_paths()

    def __init__(self, options: TaskOptions):
        super().__init__(options)
        if options.checkpoint is None or options.copies is None:
            raise ValueError("the task copy-synthesis needs a checkpoint (--system)")
        self.checkpoint, self.folder = options.checkpoint, options.copies
        self.lacking = copies.paths(self.checkpoint)
        self.drawn: list[str] = []

    def describe(self) -> dict[str, Any]:
        voice_sha256 = voices.checksum(self.checkpoint, self.options.voice)
        return {
            "left_out": {path: ", ".join(parts) for path, parts in self.lacking.items() if parts},
            "voice": self.options.voice,
            **({"voice_sha256": voice_sha256} if voice_sha256 else {}),
            "recogniser": self.recogniser.describe() if self.recogniser else None,
            "dnsmos": "speechmos, 16 kHz",
        }

    def check(self, items: Sequence[Item]) -> None:
        """Also says which paths are left out."""
        super().check(items)
        self.drawn = [item.name for item in items[:DRAWN]]
        for path, parts in self.lacking.items():
            if parts:
                say(f"note: {path} is left out: {self.checkpoint} has no {', '.join(parts)}")

    def open(self) -> Callable[[Item, Heard], Scores]:
        maker, dnsmos = CopyMaker(self.checkpoint, self.options.voice), open_dnsmos()
        self.folder.mkdir(parents=True, exist_ok=True)

        def score(item: Item, heard: Heard) -> Scores:
            speech = recordings.resample(heard.samples, heard.rate, recordings.OUTPUT_RATE)
            speech = speech[: len(speech) // UNIT_SAMPLES * UNIT_SAMPLES]
            try:
                made = maker(speech)
            except ValueError as error:
                raise jobs.Refused("no copy", f"{item.context}: {error}") from None
            mel = log_mel(speech)
            scores = {"recording": self.listen(item, speech, dnsmos)}
            scores["recording"]["seconds"] = len(speech) / recordings.OUTPUT_RATE
            for path, copy in made.items():
                scores[path] = compare(speech, mel, copy) | {"seconds": copy.seconds}
                if copy.samples is not None:
                    scores[path] |= self.listen(item, copy.samples, dnsmos)
                    recordings.save(self.folder / f"{item.name}-{path}.wav", copy.samples)
            if item.name in self.drawn:
                draw_spectrograms(item, mel, made, self.folder / f"{item.name}.png")
            return scores

        return score

    def listen(self, item: Item, samples: np.ndarray, dnsmos: Callable) -> dict[str, Any]:
        """Word errors, if there is a recogniser, and DNSMOS, of samples [N] at 24 kHz.

        Raises Refused if the recogniser fails at them.
        """
        found: dict[str, Any] = {"dnsmos": dnsmos(samples)}
        if self.recogniser:
            try:
                transcript = self.recogniser.transcribe(samples, recordings.OUTPUT_RATE)
            except ValueError as error:
                raise jobs.Refused("not recognised", f"{item.context}: {error}") from None
            errors = word_errors.compare(item.question, transcript)
            found |= dataclasses.asdict(errors) | {"transcript": transcript}
        return found

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        for path in ("recording", "vocoder", "flow", "chain"):
            rows = [row for row in scores if path in row]
            for measure, (over, under, scale) in SUMMARIES.items():
                pairs = [
                    (over(row, path), under(row, path))
                    for row in rows
                    if measure in MEASURES[path] and over(row, path) is not None
                ]
                if sum(weight for _, weight in pairs):
                    values, weights = zip(*pairs, strict=True)
                    found[f"{path}_{measure}"] = estimates.ratio(values, weights).scaled(scale)
        return {name: found[name] for name in self.metrics if name in found}


def errors_above(row: Scores, path: str) -> int | None:
    """The word errors of a copy beyond those of the recording itself."""
    errors, own = row[path].get("errors"), row["recording"].get("errors")
    return None if errors is None else errors - own


def one(row: Scores, path: str) -> int:
    return 1


def of(name: str) -> Callable[[Scores, str], Any]:
    """A score of a path by its name; None where it was not measured."""
    return lambda row, path: row[path].get(name)


# Measure -> its numerator and its denominator for a recording, and the scale of their ratio.
SUMMARIES: dict[str, tuple[Callable, Callable, float]] = {
    "wer": (of("errors"), of("words"), 100.0),
    "wer_above": (errors_above, of("words"), 100.0),
    "dnsmos": (of("dnsmos"), one, 1.0),
    "mel": (of("mel"), one, 1.0),
    "f0": (of("f0"), one, 1.0),
    "voicing": (of("voicing"), one, 100.0),
    "real_time": (of("seconds"), lambda row, path: row["recording"]["seconds"], 1.0),
}


def open_dnsmos() -> Callable[[np.ndarray], float]:
    """The function from samples [N] at 24 kHz to DNSMOS's overall quality (OVRL)."""
    from speechmos import dnsmos

    def quality(samples: np.ndarray) -> float:
        rate = recordings.INPUT_RATE
        narrow = np.clip(recordings.resample(samples, recordings.OUTPUT_RATE, rate), -1, 1)
        found: Any = dnsmos.run(narrow, rate)
        return float(found["ovrl_mos"])

    return quality


def log_mel(samples: np.ndarray) -> np.ndarray:
    """The log-mel [T, M] of samples [N] at 24 kHz."""
    return np.array(features.mel24k(jnp.asarray(samples)[None])[0])


def compare(speech: np.ndarray, mel: np.ndarray, copy: Copy) -> dict[str, float]:
    """How far a copy is from samples [N] with mel [T, M].

    mel: the mean absolute difference of log-mels, in nepers; of a copy with samples, from these.
    f0: the median absolute difference in Hz where both are voiced. voicing: the share of frames
    where one of the two is voiced.
    """
    ours = copy.mel if copy.samples is None else log_mel(copy.samples)
    found = {"mel": float(np.abs(ours - mel).mean())}
    if copy.samples is None:
        return found
    expected, actual = pitch.f0(speech), pitch.f0(copy.samples)
    both = (expected > 0) & (actual > 0)
    found["voicing"] = float(np.mean((expected > 0) != (actual > 0)))
    if both.any():
        found["f0"] = float(np.median(np.abs(expected - actual)[both]))
    return found


def draw_spectrograms(item: Item, mel: np.ndarray, made: Mapping[str, Copy], path: Path) -> None:
    """Log-mels of a recording and of its copies, side by side, as a PNG."""
    pictures = {"recording": mel} | {
        name: copy.mel if copy.samples is None else log_mel(copy.samples)
        for name, copy in made.items()
    }
    from omni2_jax.evaluate.report import plots

    plots.draw_spectrograms(item.question, pictures, path)

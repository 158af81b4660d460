"""Validation during a run: measurements on another data set, and answers to its first questions in
RUN/samples/STEP/.
"""

from pathlib import Path

import jax
import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.console import say
from omni2_jax.train import step, weights
from omni2_jax.train.data.dataset import RecordError
from omni2_jax.train.reporter import Reporter
from omni2_jax.train.sampler import Sampler
from omni2_jax.train.split import Split
from omni2_jax.train.stages.base import Stage


class Validator:
    """Measures and samples the weights that an objective's `result` gives."""

    def __init__(
        self,
        stage: Stage,
        objective: step.Objective,
        split: Split,
        frozen: weights.Params,
        start: Path,
        tokenizer: Tokenizer | None,
    ):
        self.stage, self.split, self.frozen = stage, split, frozen
        stage.validation = split.examples
        self.validate = step.compile_validation(objective)
        self.sampler = Sampler.of(stage, start, tokenizer)

    def run(self, params: weights.Params, done: int, reporter: Reporter) -> None:
        """Report the measurements after `done` steps, and the answers to some questions.

        Each damaged record of the validation data is printed once in a run, by the process that
        reads it.
        """
        sums: dict[str, np.ndarray] = {}
        for batch, _ in self.split.loader.start(0):
            values = jax.device_get(self.validate(params, self.frozen, batch))
            for name, value in values.items():
                # In float64: float32 would lose the small terms of a long sum.
                sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
        for reason in self.split.loader.source.new_damage():
            say(f"{reason}; left out of the validation")
        measured = self.stage.report(sums)
        if reporter.metrics:
            reporter.metrics.write(done - 1, measured)
        values = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in measured.items()
            if "/" not in name
        )
        reporter.say(f"step {done}: {values}")
        if self.sampler:
            self.sampler.update(weights.merged(params, self.frozen))
            folder = reporter.out / "samples" / str(done)
            folder.mkdir(parents=True, exist_ok=True)
            items = self.split.catalogue.items
            dialogues = list(dict.fromkeys(item.dialogue for item in items))
            for index in dialogues[: self.stage.train.samples]:
                self.sample(self.sampler, index, folder, done, reporter)

    def sample(
        self, sampler: Sampler, index: int, folder: Path, done: int, reporter: Reporter
    ) -> None:
        """Answer the first question of a dialogue in text, units and, with a voice, sound."""
        data = self.split.examples.data
        try:
            question = data.dialogue(index).turns[0]
            if question.clip is None or question.role != "user":
                return
            samples = data.clip(question.clip)
        except RecordError as error:
            reporter.say(f"{error}; no sample of it")
            return
        window = self.split.examples.config.segment_samples
        answer = sampler.answer(recordings.fit(samples, "truncate", window)[0])
        content = f"{question.text}\n{answer.text}\n{answer.unit_text}\n"
        (folder / f"{index}.txt").write_text(content)
        if reporter.metrics:
            reporter.metrics.text(done, f"sample {index}", f"{question.text} -> {answer.text}")
        if answer.waveform is not None and len(answer.waveform):
            recordings.save(folder / f"{index}.wav", answer.waveform)
            if reporter.metrics:
                rate = recordings.OUTPUT_RATE
                reporter.metrics.sound(done, f"sample {index}", answer.waveform, rate)
        reporter.say(f"  {question.text!r} -> {answer.text!r}, {len(answer.units)} units")

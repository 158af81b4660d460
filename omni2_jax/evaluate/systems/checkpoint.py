"""A checkpoint of this software: many questions at a time, or one at a time with a clock."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.systems import SystemOptions
from omni2_jax.evaluate.systems.base import SpokenAnswer
from omni2_jax.generate.timing import Timing, timed_replies


class CheckpointSystem:
    """A checkpoint; with the setting `speech` it needs a decoder."""

    def __init__(self, directory: Path, options: SystemOptions):
        self.directory, self.options = directory, options
        self.workers = 1 if options.timed else options.batch
        self.positions = 0  # of the LLM, in the longest prompt

    @functools.cached_property
    def checksum(self) -> str:
        """Of all files; reading them takes as long as loading the checkpoint."""
        return checksum(self.directory)

    def describe(self) -> dict[str, Any]:
        import jax

        from omni2_jax.checkpoint import voices
        from omni2_jax.config import Omni2Config

        voice_sha256 = voices.checksum(self.directory, self.options.voice)
        config = Omni2Config.load(self.directory / "config.json")
        device = jax.devices()[0]
        return {
            "kind": "checkpoint",
            "name": self.directory.name,
            "checksum": self.checksum,
            "read": self.options.read or config.read,
            "write": self.options.write or config.write,
            "trained_with": f"R = {config.read}, W = {config.write}",
            "mix": config.mix,
            "voice": self.options.voice,
            **({"voice_sha256": voice_sha256} if voice_sha256 else {}),
            "options": dataclasses.asdict(self.options.options),
            "timed": self.options.timed,
            **({} if self.options.speech else {"speech": False}),
            "device": f"{device.platform} ({device.device_kind})",
            "mesh": self.options.mesh,
        }

    def check(self, items: Sequence[Item]) -> None:
        """Raise ValueError for an unknown voice, bad audio and conversations that are too long."""
        from omni2_jax.checkpoint import voices
        from omni2_jax.generate.omni2 import describe
        from omni2_jax.generate.prompts import load_segments, prompt_ids

        speech = self.options.speech
        config, tokenizer, _ = describe(self.directory, decoder=speech, speech=speech)
        if speech:
            voices.resolve(self.directory, config, self.options.voice)
        long_turns = self.options.options.long_turns
        for item in items:
            try:
                for sound in item.turns[::2]:
                    load_segments(sound, long_turns, config.segment_samples)
                ids = prompt_ids(tokenizer, item.turns, long_turns, config.max_prompt)
            except ValueError as error:
                raise ValueError(f"{item.context}: {error}") from None
            self.positions = max(self.positions, len(ids))

    def open(self) -> Callable[[Item], SpokenAnswer]:
        from omni2_jax.generate.engine import GenerationError
        from omni2_jax.generate.omni2 import Omni2
        from omni2_jax.sharding import parse_mesh

        mesh = parse_mesh(self.options.mesh) if self.options.mesh else None
        read, write, speech = self.options.read, self.options.write, self.options.speech
        model = Omni2.load(
            self.directory, mesh=mesh, read=read, write=write, decoder=speech, speech=speech
        )
        model.voice(self.options.voice)  # an unknown voice ends the evaluation
        timed = self.options.timed
        answer = Timed(model, self.options, self.positions) if timed else self.batched(model)

        def answered(item: Item) -> SpokenAnswer:
            try:
                return answer(item)
            except (ValueError, GenerationError) as error:
                raise jobs.Refused("no answer", f"{item.context}: {error}") from None

        return answered

    def batched(self, model: Any) -> Callable[[Item], SpokenAnswer]:
        """Answers without times. Threads share an engine, which has a slot for each of them."""
        from omni2_jax.generate.omni2 import join

        # Made before the threads would make one each.
        model.engine(self.options.options, self.positions, self.workers)

        def answer(item: Item) -> SpokenAnswer:
            (replies,) = model.streams(
                [item.turns],
                self.options.voice,
                self.options.options,
                slots=self.workers,
                positions=self.positions,
            )
            whole = join(replies, spoken=self.options.speech)
            return SpokenAnswer(whole.text.strip(), whole.waveform)

        return answer


class Timed:
    """Answers with times. The first question is also answered before, which compiles everything.

    positions: of the LLM, in the longest prompt. All questions have the buffers that it needs:
    otherwise longer conversations would be compiled for while the clock runs.
    """

    def __init__(self, model: Any, options: SystemOptions, positions: int):
        self.model, self.options, self.positions = model, options, positions
        self.is_warm = False

    def __call__(self, item: Item) -> SpokenAnswer:
        if not self.is_warm:
            self.answer(item)
            self.is_warm = True
        return self.answer(item)

    def answer(self, item: Item) -> SpokenAnswer:
        from omni2_jax.generate.omni2 import join

        timing = Timing()
        first, voice, options = item.turns[0], self.options.voice, self.options.options
        if len(item.turns) == 1 and isinstance(first, Path):
            session = self.model.session(voice, options, positions=self.positions)
            replies = timed_replies(session, first, timing)
        else:  # the times of hearing and of the prompt are not separated
            sizes = {"slots": 1, "positions": self.positions}
            (replies,) = self.model.streams([item.turns], voice, options, **sizes)
        parts = []
        for reply in replies:
            parts.append(reply)
            timing.end_step(len(reply.samples) / recordings.OUTPUT_RATE)
        whole = join(iter(parts), spoken=True)
        return SpokenAnswer(whole.text.strip(), whole.waveform, seconds=seconds(timing))


def seconds(timing: Timing) -> dict[str, float]:
    """The times of an answer, in seconds, by name."""
    times = {"total": timing.steps[-1], **timing.stages}
    times["first_step"] = timing.steps[0] - sum(timing.stages.values())
    if len(timing.steps) > 1:
        times["later_steps"] = (timing.steps[-1] - timing.steps[0]) / (len(timing.steps) - 1)
    if timing.first_audio is not None:
        times["first_audio"] = timing.first_audio
    return times


def checksum(directory: Path) -> str:
    """A checksum of all files of a checkpoint: names, sizes and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(directory)).encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()

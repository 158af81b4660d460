"""Speaks one dialogue: questions in a voice drawn for it, replies in the one voice for all.

Every clip is checked. Questions that fail are spoken again, all of the dialogue's, in another
voice; a reply that fails is made again with another seed. What fails every time is refused.
"""

import hashlib
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.jobs import Refused, Result
from omni2_jax.synthesize import augment
from omni2_jax.synthesize.engines import EngineError, open_engine
from omni2_jax.synthesize.voices import Voice, VoicesFile

# Of engines, or of the recogniser, one after the other: then none is likely to work again.
MAX_FAILURES = 30


@dataclass(frozen=True)
class SpeakerOptions:
    """How clips are made.

    attempts: how often a clip is made, at most. recogniser: None, or what `open_recogniser` takes;
    recogniser_model: its name at a URL; max_wer: the errors per word that it may hear.
    replies: whether the replies of dialogues are spoken, too.
    """

    seed: int = 0
    attempts: int = 3
    recogniser: str | None = None
    recogniser_model: str = "whisper-1"
    language: str = "en"
    max_wer: float = 0.5
    replies: bool = True


class Speaker:
    """The function of the job: a dialogue -> its clips, and its line of the manifest.

    Raises ValueError if the recogniser cannot be opened.
    """

    def __init__(self, voices: VoicesFile, options: SpeakerOptions):
        self.voices, self.options = voices, options
        self.engines = {name: open_engine(name, voices.engines[name]) for name in voices.used()}
        self.reply_voice = voices.reply_voice()
        self.recogniser = None
        if options.recogniser is not None:
            from omni2_jax import recognisers

            hearing = recognisers.RecogniserOptions(
                language=options.language, model=options.recogniser_model
            )
            self.recogniser = recognisers.open_recogniser(options.recogniser, hearing)
            self.hearing = threading.Semaphore(self.recogniser.workers)
        self.failures = self.unheard = 0

    def __call__(self, dialogue: Mapping[str, Any]) -> Result:
        """See `make_speech` for what comes out of a dialogue, or of a sentence {"id", "text"}.

        Raises Refused if a clip cannot be made, ValueError or RuntimeError if none can.
        """
        if "text" in dialogue:
            return self.sentence(dialogue["id"], dialogue["text"])
        voice, questions = self.questions(dialogue)
        turns, files = [], {}
        for number, (turn, question) in enumerate(zip(dialogue["turns"], questions, strict=True)):
            name = f"{folder_of(dialogue['id'])}/{dialogue['id']}-{number}"
            asked = {"role": "user", "text": turn["question"]}
            asked |= recorded(question, f"{name}-user.flac", recordings.INPUT_RATE, files)
            asked |= {key: turn[key] for key in ("answers", "topic") if turn.get(key)}
            answered = {"role": "assistant", "text": turn["reply"]}
            if self.options.replies:
                reply = self.reply(turn["reply"], f"{dialogue['id']}/{number}")
                rate = recordings.OUTPUT_RATE
                answered |= recorded(reply, f"{name}-assistant.flac", rate, files)
            turns += [asked, answered]
        line = {key: dialogue[key] for key in ("id", "split", "topic", "voices")}
        line |= {"voice": str(voice), "turns": turns}
        return Result({"place": dialogue["place"], "line": line}, files)

    def questions(self, dialogue: Mapping[str, Any]) -> tuple[Voice, list["Spoken"]]:
        """All questions of a dialogue in one voice. Raises Refused after the last attempt."""
        texts = [turn["question"] for turn in dialogue["turns"]]
        failure = Refused("no attempts", "")
        for attempt in range(self.options.attempts):
            key = f"{self.options.seed}/{dialogue['id']}/{attempt}"
            voice = self.voices.draw(random.Random(key), dialogue["voices"] == "unseen")
            try:
                spoken = [self.question(text, voice, f"{key}/{i}") for i, text in enumerate(texts)]
                return voice, spoken
            except Refused as refused:
                message = f"question in the voice {voice}: {refused.message}"
                failure = Refused(refused.reason, message)
        raise failure

    def question(self, text: str, voice: Voice, key: str) -> "Spoken":
        """A question with its changes. An empty one is a recording in which nobody speaks."""
        rng = np.random.default_rng(number_of(key))
        if not text.strip():
            return Spoken(augment.without_speech(recordings.INPUT_RATE, rng), {})
        spoken = self.clip(text, voice, key, recordings.INPUT_RATE)
        changes = self.voices.augment.draw(rng)
        if not changes:
            return spoken
        samples = augment.changed(spoken.samples, recordings.INPUT_RATE, changes, rng)
        return Spoken(samples, spoken.notes | {"augment": changes})

    def sentence(self, id: str, text: str) -> Result:
        """A sentence in the voice of the replies."""
        spoken = self.reply(text, id)
        files: dict[str, bytes] = {}
        name = f"{folder_of(id)}/{id}.flac"
        notes = recorded(spoken, name, recordings.OUTPUT_RATE, files)
        return Result({"id": id, "text": text} | notes, files)

    def reply(self, text: str, key: str) -> "Spoken":
        """A text in the voice of the replies. Raises Refused after the last attempt."""
        failure = Refused("no attempts", "")
        for attempt in range(self.options.attempts):
            seed_key = f"{self.options.seed}/{key}/reply/{attempt}"
            try:
                return self.clip(text, self.reply_voice, seed_key, recordings.OUTPUT_RATE)
            except Refused as refused:
                failure = Refused(refused.reason, f"reply: {refused.message}")
        raise failure

    def clip(self, text: str, voice: Voice, key: str, rate: int) -> "Spoken":
        """A text as speech at `rate` Hz that passes the checks. Raises Refused if it does not."""
        try:
            samples = self.engines[voice.engine].speak(text, voice, number_of(key), rate)
        except EngineError as error:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                raise RuntimeError(
                    f"{MAX_FAILURES} clips in a row could not be made; the last one by the engine "
                    f"{voice.engine}: {error}"
                ) from None
            raise Refused("no clip", str(error)) from None
        self.failures = 0
        self.voices.checks.check(samples, rate, text)
        return Spoken(samples, self.heard(samples, rate, text))

    def heard(self, samples: np.ndarray, rate: int, text: str) -> dict[str, Any]:
        """The word error rate of a clip, as a note.

        Raises Refused if it is too high, or the recogniser fails at this clip.
        """
        if self.recogniser is None:
            return {}
        from omni2_jax.evaluate import word_errors

        try:
            with self.hearing:
                transcript = self.recogniser.transcribe(samples, rate)
        except ValueError as error:
            self.unheard += 1
            if self.unheard >= MAX_FAILURES:
                raise RuntimeError(
                    f"the recogniser failed at {MAX_FAILURES} clips in a row; the last one: {error}"
                ) from None
            raise Refused("not recognised", f"{text!r}: {error}") from None
        self.unheard = 0
        rate_of_errors = word_errors.compare(text, transcript).rate
        if rate_of_errors > self.options.max_wer:
            message = f"{text!r} is heard as {transcript!r}: {rate_of_errors:.0%} word errors"
            raise Refused("heard wrong", message)
        return {"wer": round(rate_of_errors, 3)}


@dataclass(frozen=True)
class Spoken:
    """Samples [N] of a clip, and what its turn of the manifest notes of it."""

    samples: np.ndarray
    notes: dict[str, Any]


def recorded(spoken: Spoken, name: str, rate: int, files: dict[str, bytes]) -> dict[str, Any]:
    """What a turn of the manifest says of its clip, which is added to `files`."""
    files[name] = recordings.encode(spoken.samples, rate)
    return {"audio": name, "seconds": round(len(spoken.samples) / rate, 3)} | spoken.notes


def number_of(key: str) -> int:
    """A seed of 31 bits that follows from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") >> 1


def folder_of(id: str) -> str:
    """The folder of the clips of an id. There are 256 of them, so that none gets too large."""
    return f"clips/{hashlib.sha256(id.encode()).hexdigest()[:2]}"

"""The released conversations of the goldens, and how the tests of generation request them."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.generate.engine import Engine, PromptPiece, ResponseStream
from omni2_jax.generate.omni2 import Answer, Omni2, Options, join
from omni2_jax.generate.prompts import Conversation, split
from omni2_jax.generate.read_write_state import Request
from tests.support.paths import AUDIO, GOLDENS

CASES = json.loads((GOLDENS / "omni2" / "cases.json").read_text())["cases"]

# As released, but for the small chunks of the flow: they are quick to compile and to run.
GREEDY = Options(
    unit_temperature=0.0,
    unit_vocabulary="all",
    max_new_tokens=64,
    max_flush_units=60,
    chunk=10,
    left_chunks=2,
)
SHORT = {"max_new_tokens": 12, "max_flush_units": 15}  # where steps are slow


def clip(name: str) -> Path:
    return AUDIO / f"{name}.wav"


def conversation(name: str) -> list[Path | str]:
    return [
        clip(turn["clip"]) if "clip" in turn else turn["text"]
        for turn in CASES[name]["conversation"]
    ]


def request_of(model: Omni2, name: str, **changes) -> Request:
    """A case's request, with its end token, limits and penalty; `changes` are other options."""
    settings = dict(CASES[name]["generate_kwargs"])
    text_eos = settings.pop("eos_token_id", None)
    options = dataclasses.replace(GREEDY, **(settings | changes))
    return Request.of(model.config, options, model.defaults, text_eos)


@functools.cache
def pieces(model: Omni2, name: str) -> list[PromptPiece]:
    """A case's prompt."""
    turns = [model.hear(turn)[0] if isinstance(turn, Path) else turn for turn in conversation(name)]
    ids = model.tokenizer.prompt([turn if isinstance(turn, str) else 1 for turn in turns])
    return split(ids, turns[::2], model.tokenizer.positions + 128)


def submit(engine: Engine, model: Omni2, name: str, **changes) -> ResponseStream:
    """Queue a case, its options changed."""
    return engine.submit(pieces(model, name), request_of(model, name, **changes), model.voice(None))


@dataclasses.dataclass
class Said:
    """All of a stream: token ids and samples."""

    text: list[int]
    speech: list[int]
    samples: np.ndarray

    @classmethod
    def by(cls, stream: ResponseStream) -> "Said":
        outputs = list(stream)
        chain = itertools.chain.from_iterable
        return cls(
            text=list(chain(output.text_tokens for output in outputs)),
            speech=list(chain(output.speech_tokens for output in outputs)),
            samples=np.concatenate([output.samples for output in outputs]),
        )

    def __eq__(self, other: "Said") -> bool:
        return (
            self.text == other.text
            and self.speech == other.speech
            and np.array_equal(self.samples, other.samples)
        )


def broken(piece: PromptPiece) -> PromptPiece:
    """A prompt with one feature that is not a number."""
    return dataclasses.replace(piece, features=jnp.asarray(piece.features).at[7, 3].set(jnp.nan))


def answer(model: Omni2, conversation: Conversation, options: Options) -> Answer:
    """`Omni2.answer` with the engine of three slots, which other tests have compiled."""
    (stream,) = model.streams([conversation], options=options, slots=3)
    return join(stream, model.config.flow is not None)


@contextlib.contextmanager
def three_slots(model: Omni2) -> Iterator[None]:
    """Within this block the model answers with engines of three slots, which others have compiled.

    They are idle afterwards.
    """
    of_slots, used = model.engine, set()

    def engine(options: Options, prompt: int, slots: int = 1) -> Engine:
        found = of_slots(options, prompt, max(slots, 3))
        used.add(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "engine", engine)
        yield
    for stream in {stream for one in used for stream in one.slots if stream}:
        stream.cancel()

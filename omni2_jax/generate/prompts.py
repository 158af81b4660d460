"""Conversations and spoken turns as prompts for the LLM."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.generate.engine import PromptPiece
from omni2_jax.generate.read_write_state import MAX_FORCED
from omni2_jax.models.model import SPEECH

# A file, or samples [N] at 16 kHz: floats from -1 to 1, or int16.
Sound = str | Path | np.ndarray
# One sound, or sounds at even places (the user's turns) and texts between them (the model's).
Conversation = Sound | Sequence[Sound | str]


def turns_of(conversation: Conversation) -> list[Sound | str]:
    """The turns of a conversation, from the user's first to the user's last.

    Raises ValueError for an even number of turns or a turn of the wrong kind.
    """
    if isinstance(conversation, str | Path | np.ndarray):
        return [conversation]
    turns = list(conversation)
    if len(turns) % 2 == 0:
        raise ValueError(f"a conversation of {len(turns)} turns does not end with the user's")
    for index, turn in enumerate(turns):
        if index % 2 and not isinstance(turn, str):
            raise ValueError(f"turn {index} is {type(turn).__name__}, expected the model's text")
    return turns


def load_segments(sound: Sound, long_turns: str, window: int) -> list[np.ndarray]:
    """A sound as segments of at most `window` samples, [N] at 16 kHz.

    long_turns: "refuse", "truncate" or "split" a longer one. Raises ValueError for bad audio.
    """
    if isinstance(sound, str | Path):
        return recordings.load_turn(sound, long_turns, window)
    samples = recordings.check(as_float32(np.asarray(sound)), "the samples given")
    return recordings.fit(samples, long_turns, window)


def as_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of a floating type or of int16 as float32, in which full scale is 1.0.

    Raises ValueError for another type, whose full scale is not known.
    """
    if samples.dtype == np.int16:
        return recordings.from_int16(samples)
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(
            f"the samples given are of type {samples.dtype}; expected int16, or floats from -1 to 1"
        )
    return samples.astype(np.float32)


def prompt_ids(
    tokenizer: Tokenizer, conversation: Conversation, long_turns: str, limit: int
) -> np.ndarray:
    """The prompt of a conversation, int32 [P], with SPEECH at each speech position.

    A sound is only read if its length decides how many segments it has (long_turns "split").
    Raises ValueError for a conversation that `turns_of` refuses, or of more than `limit` positions.
    """
    turns, window = turns_of(conversation), tokenizer.config.segment_samples
    parts: list[str | int] = []
    for index, turn in enumerate(turns):
        if index % 2:
            assert isinstance(turn, str)
            parts.append(turn)
        else:
            splits = long_turns == "split"
            parts.append(len(load_segments(turn, long_turns, window)) if splits else 1)
    ids = tokenizer.prompt(parts)
    if len(ids) > limit:
        raise ValueError(
            f"the conversation takes {len(ids)} positions, at most {limit} fit; leave out old turns"
        )
    return np.asarray(ids, np.int32)


def forced_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that the LLM is made to answer with, and an end token.

    Raises ValueError for a text without words, one of more than MAX_FORCED tokens, and one with the
    name of a special token, which would end or change the answer.
    """
    ids = tokenizer.answer(text.strip())
    if not ids:
        raise ValueError("there is no text to say")
    special = set(ids).intersection(tokenizer.text.all_special_ids)
    if special:
        name = tokenizer.text.convert_ids_to_tokens(min(special))
        raise ValueError(f"the text to say holds {name!r}, the name of a special token")
    ids = [*ids, tokenizer.config.tokens.text_eos[0]]
    if len(ids) > MAX_FORCED:
        raise ValueError(
            f"the text to say has {len(ids)} tokens, at most {MAX_FORCED} can be said at once; "
            "say its paragraphs one by one"
        )
    return ids


def split(
    ids: Sequence[int] | np.ndarray, features: Sequence[jax.Array], size: int
) -> list[PromptPiece]:
    """Split a prompt into pieces of at most `size` positions, each with at most one segment.

    ids: with SPEECH at each speech position. features: [F, D] of every segment, in order; a prompt
    without speech has one segment, which is not used.
    """
    prompt = np.asarray(ids, np.int32)
    is_speech, positions = prompt == SPEECH, features[0].shape[0]
    count = np.cumsum(is_speech)  # features used up to each position, inclusive
    assert count[-1] in (0, positions * len(features)), "the tokenizer and the features disagree"
    # The positions where the segments begin, but for the first segment.
    starts = np.searchsorted(count, np.arange(1, len(features)) * positions + 1)
    edges = [0, *starts.tolist(), len(prompt)]
    pieces = []
    for segment, (begin, end) in enumerate(itertools.pairwise(edges)):
        for start in range(begin, end, size):
            used = int(is_speech[begin:start].sum())
            piece = prompt[start : min(start + size, end)]
            pieces.append(PromptPiece(piece, features[segment], used))
    return pieces

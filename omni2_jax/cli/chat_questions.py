"""Answers to the conversations of a questions.json, in the released format."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich.progress

from omni2_jax.console import console, progress_bar, say

if TYPE_CHECKING:
    import numpy as np

    from omni2_jax.generate.omni2 import Answer, Omni2
    from omni2_jax.generate.options import Options
    from omni2_jax.generate.questions import Question


def answer_questions(
    load: "Callable[[], Omni2]",
    questions: "Sequence[Question]",
    out_dir: Path,
    with_wav: bool,
    batch: int,
    voice: str | None,
    options: "Options",
) -> None:
    """Answer every question, `batch` at the same time.

    As soon as an answer is complete, its line in OUT_DIR/answers.jsonl and its wav are written.
    load: loads the checkpoint. Raises ValueError, naming file and item, for a conversation whose
    answer fails.
    """
    from omni2_jax.audio import recordings
    from omni2_jax.generate.omni2 import join

    answers = out_dir / "answers.jsonl"
    if answers.exists():
        raise ValueError(f"{answers} exists already; give a new --out-dir")
    existing = next(parent for parent in answers.absolute().parents if parent.exists())
    recordings.check_writable(existing / answers.name)
    with console.status("loading"):
        model = load()
        conversations = [question.turns for question in questions]
        slots = min(batch, len(questions))
        streams = model.streams(conversations, voice, options, slots)
    with progress_bar(rich.progress.MofNCompleteColumn()) as progress:
        task = progress.add_task("answering", total=len(questions))
        for question, replies in zip(questions, streams, strict=True):
            try:
                answer = join(replies, with_wav)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{question.context}: {error}") from None
            out_dir.mkdir(parents=True, exist_ok=True)
            if with_wav:
                save_speech(out_dir / f"{question.name}.wav", answer.waveform)
            append_line(answers, question, answer)
            say(f"{question.name}: {answer.text.strip()}")
            progress.advance(task)


def check_prompts(
    checkpoint: Path,
    decoder: bool,
    speech: bool,
    questions: "Sequence[Question]",
    options: "Options",
) -> None:
    """Raise ValueError, naming file and item, for a conversation that is too long.

    This needs the checkpoint's config and tokenizer, not its parameters. decoder, speech: see
    `generate.omni2.parts_of`.
    """
    from omni2_jax.generate.omni2 import describe
    from omni2_jax.generate.prompts import prompt_ids

    config, tokenizer, _ = describe(checkpoint, decoder, speech)
    for question in questions:
        try:
            prompt_ids(tokenizer, question.turns, options.long_turns, config.max_prompt)
        except ValueError as error:
            raise ValueError(f"{question.context}: {error}") from None


def append_line(path: Path, question: "Question", answer: "Answer") -> None:
    """Append an answer to answers.jsonl."""
    line = {
        "question_id": question.id,
        "prediction": answer.text.strip(),
        "prediction_units": answer.unit_text,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def save_speech(path: Path, waveform: "np.ndarray | None") -> bool:
    """Write samples [N] at 24 kHz -> whether there were any; an answer may have no unit at all."""
    from omni2_jax.audio import recordings

    if waveform is None or not waveform.size:
        say(f"no speech, hence no {path}")
        return False
    recordings.save(path, waveform)
    return True

"""Instructions that dialogues begin with, from the files that people have.

Alpaca       a JSON array of {"instruction", "input", "output"}
UltraChat    lines of {"data": [question, answer, ...]}, or of {"prompt", "messages"}
InstructS2S  a JSON array of {"conversation": [{"from": "human", "text"}, ...]}
questions    a .txt file with one in each line

Arrays and lines are both read with either content. Of a dialogue, only the first thing that the
user says is taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni2_jax.train.data.sources import SourceError, json_array, json_lines

SUFFIXES = (".txt", ".json", ".jsonl")


@dataclass(frozen=True)
class Seed:
    """What a user wants. key: names it. text: the instruction; or, if it cannot be read, empty, and
    `fault` says why. share: how much of all files was read up to here, 0 to 1."""

    key: str
    text: str
    share: float
    fault: str = ""


def read_seeds(paths: Sequence[Path]) -> Iterator[Seed]:
    """The seeds of all files, in order.

    Raises ValueError, one line naming the file, if one is missing, empty, of an unknown format or
    named as another one; partly when the iterator arrives at it. A single element that cannot be
    read is a seed with a fault.
    """
    named: dict[str, Path] = {}
    for path in paths:
        if path.suffix not in SUFFIXES or not path.is_file():
            raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
        if path.stem in named:
            raise ValueError(
                f"{named[path.stem]} and {path} would give their dialogues the same names, as "
                f"{path.stem}-0000000; expected files of different names"
            )
        named[path.stem] = path
    for number, path in enumerate(paths):
        index = -1
        for index, (element, done) in enumerate(elements(path)):
            key, share = f"{path.stem}-{index:07d}", (number + done) / len(paths)
            try:
                yield Seed(key, instruction(element), share)
            except SourceError as error:
                if index == 0:
                    raise ValueError(f"{path} is in no known format: {error}") from None
                yield Seed(key, "", share, str(error))
        if index < 0:
            raise ValueError(f"{path} is empty")


def elements(path: Path) -> Iterator[tuple[object, float]]:
    """The values of a file, each with the share of the file that was read."""
    if path.suffix != ".txt":
        yield from (json_array if path.suffix == ".json" else json_lines)(path)
        return
    size, done = max(1, path.stat().st_size), 0
    with open(path, "rb") as lines:
        for line in lines:
            done += len(line)
            text = line.decode("utf-8-sig", errors="replace").strip()
            if text:
                yield text, done / size


def instruction(element: object) -> str:
    """The instruction in an element of a file. Raises SourceError if it has none."""
    if isinstance(element, SourceError):
        raise element
    text = element
    if isinstance(element, Mapping):
        text = instruction_of(element)
    if not isinstance(text, str) or not text.strip():
        keys = (
            ", ".join(map(str, element)) if isinstance(element, Mapping) else type(element).__name__
        )
        raise SourceError("no instruction", f"no instruction is found in {keys!r:.80}")
    return text.strip()


def instruction_of(element: Mapping) -> object:
    """What may be the instruction of an object; the module's docstring lists the formats."""
    if "instruction" in element:
        parts = [element["instruction"], element.get("input")]
        return "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    if isinstance(element.get("prompt"), str):
        return element["prompt"]
    turns = element.get("data") or element.get("messages") or element.get("conversation")
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, Mapping):
        return first.get("text") or first.get("content")
    return first

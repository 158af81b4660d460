"""questions.json, the released format of conversations to answer."""

import json
from pathlib import Path

from omni2_jax.audio import recordings


def read_questions(path: Path, long: str) -> list[dict]:
    """The items of a questions.json, sound paths resolved against its folder; raises ValueError on the first thing that is wrong.

    long: what is to become of turns over 30 s, see `Options`.
    """
    try:
        items = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path} holds no list of questions")
    parsed = []
    for number, item in enumerate(items):
        where = f"{path}: item {number}"
        if (
            not isinstance(item, dict)
            or "id" not in item
            or not isinstance(item.get("conversation"), list)
        ):
            raise ValueError(f"{where} has no id or no conversation")
        name = str(item["id"])
        if name in ("", ".", "..") or "/" in name or name in {other["id"] for other in parsed}:
            raise ValueError(f"{where}: id {name!r} is used twice or cannot be a file's name")
        turns = []
        for i, turn in enumerate(item["conversation"]):
            key = "text" if i % 2 else "speech"
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise ValueError(f"{where} ({name}): turn {i} has no {key!r}")
            turns.append(turn[key] if i % 2 else sound_path(path, turn[key]))
        if len(turns) % 2 == 0:
            raise ValueError(
                f"{where} ({name}): the conversation does not end with the user's turn"
            )
        for turn in turns[::2]:
            recordings.fit(recordings.load(turn), over=long, name=turn)
        parsed.append({"id": name, "given": item["id"], "turns": turns})
    return parsed


def sound_path(questions: Path, sound: str) -> Path:
    """Relative to the questions file; the released examples are relative to where one stands."""
    beside = questions.parent / sound
    return beside if beside.exists() or not Path(sound).exists() else Path(sound)

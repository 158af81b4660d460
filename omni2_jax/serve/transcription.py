"""What users say, as text that grows while they say it. The model itself does not need it.

A recogniser takes whole recordings. So it hears a turn again whenever that has become a second
longer. Words are certain once two hearings in a row agree on them and on all words before: the last
ones of a recording that is cut off are often wrong.
"""

from typing import TYPE_CHECKING

import numpy as np

from omni2_jax.audio.recordings import INPUT_RATE
from omni2_jax.serve.conversation import Item

if TYPE_CHECKING:
    from omni2_jax.serve.realtime import Realtime

EVENT = "conversation.item.input_audio_transcription"
NEW_SECONDS = 1.0  # of speech, before the recogniser hears a turn again


class GrowingTranscript:
    """The words of one turn that are certain so far."""

    def __init__(self, item_id: str):
        """item_id: of the item that the turn will become."""
        self.item_id = item_id
        self.heard = 0  # samples
        self.last: list[str] = []
        self.certain: list[str] = []

    def needs(self, samples: int) -> bool:
        """Whether enough of a turn of so many samples, at 16 kHz, was not heard yet."""
        if samples - self.heard < NEW_SECONDS * INPUT_RATE:
            return False
        self.heard = samples
        return True

    def add(self, text: str) -> str:
        """What can be written behind the words so far, after one more hearing; "" for nothing."""
        words, known = text.split(), len(self.certain)
        agreed = 0
        while agreed < min(len(words), len(self.last)) and words[agreed] == self.last[agreed]:
            agreed += 1
        self.last = words
        if words[:known] != self.certain or agreed <= known:
            return ""
        self.certain = words[:agreed]
        return " " * bool(known) + " ".join(words[known:agreed])


async def of_beginning(
    link: "Realtime", growing: GrowingTranscript, samples: np.ndarray, language: str | None
) -> None:
    """Send what is certain of a turn that is being spoken; samples [N] are its beginning.

    This is done for one turn of the server at a time: others do without in the meantime.
    """
    try:
        text = await link.server.transcribe(samples, language)
    finally:
        link.server.is_transcribing = False
    delta = growing.add(text)
    if delta and growing.item_id == link.turn_id:
        link.send(f"{EVENT}.delta", item_id=growing.item_id, content_index=0, delta=delta)


async def of_turn(link: "Realtime", item: Item, samples: np.ndarray, language: str | None) -> None:
    """Send what the recogniser understands of a whole turn, samples [N]."""
    place = {"item_id": item.id, "content_index": 0}

    def fail(message: str) -> None:
        failure = {"type": "transcription_error", "message": message}
        link.send(f"{EVENT}.failed", **place, error=failure)

    if link.transcriptions >= link.limits.transcriptions:
        fail("too many turns wait for the recogniser")
        return
    link.transcriptions += 1
    try:
        text = await link.server.transcribe(samples, language)
    except Exception as error:
        link.server.log_failure(error)
        fail("the recogniser failed")
        return
    finally:
        link.transcriptions -= 1
    item.transcript = text
    usage = {"type": "duration", "seconds": len(samples) / INPUT_RATE}
    link.send(f"{EVENT}.completed", **place, transcript=text, usage=usage)

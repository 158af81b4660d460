"""Where the server hears turns begin and end, and when it begins to encode them."""

import asyncio
import io
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from omni2_jax.audio.recordings import INPUT_RATE, load_turn
from omni2_jax.audio.voice_activity import WINDOW
from omni2_jax.serve.audio import LONG, Decoder, decode
from omni2_jax.serve.events import EventError, ServerVad
from omni2_jax.serve.listener import Listener
from omni2_jax.serve.turn_detection import Change, TurnDetection, TurnDetector
from tests.support.paths import EXAMPLES
from tests.support.server import pcm

MS = INPUT_RATE // 1000  # samples


def windows(milliseconds: int) -> int:
    return -(-milliseconds * MS // WINDOW)


def heard(script: str) -> Any:
    """Stands for a detector that hears speech (s), hardly speech (h) or silence (.) in windows."""
    chances = iter([{"s": 0.9, "h": 0.4, ".": 0.1}[kind] for kind in script])
    return SimpleNamespace(process_samples=lambda window: next(chances), reset=lambda: None)


def changes(script: str, **settings) -> list[tuple[str, int]]:
    """What is noticed of windows as in `heard`; those in between are silent."""
    detector = TurnDetector(TurnDetection(**settings))
    detector.vad, detector.between = heard(script), heard("." * len(script))
    found = detector.feed(np.zeros(len(script) * WINDOW, np.float32))
    return [(one.change.value, one.sample) for one in found]


def test_a_turn_with_a_pause():
    """Padding before it; a pause that speech follows is no end; the silence is cut off."""
    before, pause = windows(500), windows(200)
    script = "." * before + "s" * 10 + "." * pause + "s" * 5 + "." * windows(500)
    start, first = before * WINDOW, (before + 10) * WINDOW
    again = first + pause * WINDOW
    last = again + 5 * WINDOW
    assert changes(script) == [
        ("started", start - 300 * MS),
        ("paused", first + 96 * MS),
        ("resumed", again),
        ("paused", last + 96 * MS),
        ("stopped", last + 96 * MS),
    ]
    assert changes(script[:-1])[-1][0] == "paused"  # 500 ms are needed, no window less


def test_settings_of_turn_detection():
    script = "." * 40 + "s" * 10 + "." * 10
    kinds = [kind for kind, _ in changes(script, silence_duration_ms=300)]
    assert kinds == ["started", "paused", "stopped"]
    assert changes(script, prefix_padding_ms=0)[0] == ("started", 40 * WINDOW)
    assert changes(script, threshold=0.95) == []
    for threshold in (0.0, 0.1):
        low = TurnDetector(TurnDetection(threshold=threshold))
        low.speaking = True
        found = [one.change for one in low.feed(np.zeros(16 * WINDOW, np.float32))]
        assert found[-1] is Change.STOPPED
    # Once it has begun, speech ends below the threshold less 0.15 only.
    assert changes("s" + "h" * 40) == changes("s") and changes("h" * 40) == []


def test_speech_is_noticed_between_two_windows():
    """The second detector's windows begin in the middle of the first one's."""
    for split in (1, 3, WINDOW, 40 * WINDOW):
        detector = TurnDetector(TurnDetection(prefix_padding_ms=0))
        # Between windows 10 and 11 the second detector is sure; from then on it is not asked.
        detector.vad = heard("." * 11 + "s" * 9 + "." * 16)
        detector.between = heard("." * 10 + "s")
        sound = np.zeros(36 * WINDOW, np.float32)
        found = [
            (one.change, one.sample)
            for start in range(0, len(sound), split)
            for one in detector.feed(sound[start : start + split])
        ]
        assert found == [
            (Change.STARTED, 10 * WINDOW + WINDOW // 2),
            (Change.PAUSED, 20 * WINDOW + 96 * MS),
            (Change.STOPPED, 20 * WINDOW + 96 * MS),
        ]


@pytest.mark.parametrize("name", ["sum", "question", "hobby", "followup"])
def test_speech_is_noticed_within_100_ms(name):
    """From the first loud sample to the block that tells of it: barge-in waits for it.

    The blocks are the page's, of 16 ms. The room before the speech is not silent, and the speech
    begins anywhere in what the detector takes at a time.
    """
    speech = np.frombuffer(pcm(EXAMPLES / f"{name}.wav", 24_000), "<i2").astype(np.int64)
    speech = speech[np.argmax(np.abs(speech) > 0.1 * np.abs(speech).max()) :]
    random = np.random.default_rng(0)
    block = 24 * 16
    for onset in range(24_000, 24_000 + 24 * 32, 24 * 4):
        noise = random.normal(0, 30, onset).astype(np.int64)
        sound = np.concatenate([noise, speech]).astype("<i2")
        decoder, detector = Decoder("audio/pcm"), TurnDetector(TurnDetection())
        for start in range(0, len(sound), block):
            found = list(detector.feed(decoder(sound[start : start + block].tobytes())))
            if found:
                break
        assert found[0].change is Change.STARTED
        assert onset < start + block <= onset + 24 * 100


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1e-3, samples)


def hum(samples: int) -> np.ndarray:
    """Of a motor, as loud as the voice's quiet parts, fading in for a second."""
    seconds = np.arange(samples) / INPUT_RATE
    waves = sum(np.sin(2 * np.pi * 120 * k * seconds + 0.3 * k) / k for k in range(1, 5))
    return 0.035 * waves * np.minimum(seconds, 1.0)


@pytest.mark.parametrize("room", [noise, hum])
@pytest.mark.parametrize("name", ["sum", "question", "hobby", "followup"])
def test_the_room_after_a_turn_is_no_turn(name, room):
    (speech,) = load_turn(EXAMPLES / f"{name}.wav")
    for lead in range(2 * INPUT_RATE, 2 * INPUT_RATE + WINDOW, 64):
        sound = np.pad(speech, (lead, 3 * INPUT_RATE))
        detector = TurnDetector(TurnDetection())
        found = detector.feed((sound + room(len(sound))).astype(np.float32))
        edges = [one.change for one in found if one.change in (Change.STARTED, Change.STOPPED)]
        assert edges == [Change.STARTED, Change.STOPPED]


class Hearings:
    """Stands for the encoder: what it was asked to encode, and the tasks."""

    def __init__(self):
        self.lengths, self.tasks = [], []

    def start(self, samples: np.ndarray) -> asyncio.Task:
        self.lengths.append(len(samples))
        self.tasks.append(asyncio.ensure_future(asyncio.sleep(60)))
        return self.tasks[-1]


async def listened(script: str, seconds: float = 30.0, together: int = 1):
    """A listener that has got windows as in `changes` -> (it, hearings, changes).

    together: how many windows come in one event.
    """
    hearings, found = Hearings(), []
    listener = Listener(hearings.start, seconds, "audio/pcm")
    listener.decoder = lambda data, last: np.zeros(len(data) * WINDOW, np.float32)  # type: ignore
    listener.detect_turns(ServerVad())
    assert listener.detector
    listener.detector.vad, listener.detector.between = heard(script), heard("." * len(script))
    for start in range(0, len(script), together):
        async for detection in listener.append(bytes(len(script[start:][:together]))):
            commit = (
                listener.commit(detection.sample) if detection.change.value == "stopped" else ()
            )
            found.append((detection, *commit))
    await asyncio.sleep(0)  # cancelled tasks end
    return listener, hearings, found


def test_the_encoder_starts_when_silence_begins():
    """If the user goes on, that is thrown away; at the turn's end its features are on their way."""

    async def run():
        script = "." * 40 + "s" * 20 + "." * 6 + "s" * 20 + "." * 16
        _, hearings, found = await listened(script)
        (started, stopped) = found
        assert started[0].change is Change.STARTED and stopped[0].change is Change.STOPPED
        first, second = hearings.tasks
        assert first.cancelled() and stopped[2] is second
        speech = 300 * MS + 96 * MS  # and before it and behind it
        assert hearings.lengths == [speech + 20 * WINDOW, speech + 46 * WINDOW]
        assert len(stopped[1]) == hearings.lengths[1]
        second.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("together", [2, 17, 1000])
@pytest.mark.parametrize("seconds", [30.0, 3.0])
def test_the_size_of_events_changes_no_turn(together, seconds):
    """Several turns may begin and end in the audio of one event."""
    script = 3 * ("." * 40 + "s" * 50 + "." * 16) + "s" * 250 + "." * 1000

    async def run():
        _, _, expected = await listened(script, seconds)
        _, _, found = await listened(script, seconds, together)
        assert len(expected) >= 8
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[0] == theirs[0]
            assert [len(samples) for samples in ours[1:2]] == [len(one) for one in theirs[1:2]]

    asyncio.run(run())


def test_detectors_are_handed_on():
    """Making them takes the time of all clients: once for each connection at the same time."""
    listeners = [Listener(Hearings().start, 30.0, "audio/pcm") for _ in range(3)]
    first, second, third = listeners
    first.detect_turns(ServerVad())
    kept = first.detectors or ()
    first.detect_turns(None)
    first.detect_turns(ServerVad(threshold=0.7))
    assert first.detectors is kept
    second.detect_turns(ServerVad())
    assert not set(map(id, kept)) & set(map(id, second.detectors or ()))
    first.close()
    third.detect_turns(ServerVad())
    assert third.detectors is kept and first.detector is None


@pytest.mark.parametrize("kind", ["audio/pcm", "audio/pcmu"])
def test_a_turn_of_push_to_talk_has_all_of_its_samples(kind):
    """What the resampler holds back belongs to this turn, and nothing of it to the next one."""
    milliseconds = {"audio/pcm": 48, "audio/pcmu": 8}[kind]  # bytes

    async def run():
        listener = Listener(Hearings().start, 30.0, kind)

        async def committed(size: int) -> int:
            async for _ in listener.append(bytes(size * milliseconds)):
                pass
            samples, task = listener.commit()
            task.cancel()
            return len(samples)

        assert [await committed(size) for size in (100, 1000)] == [100 * MS, 1000 * MS]
        async for _ in listener.append(bytes(500 * milliseconds)):
            pass
        listener.clear()
        assert await committed(250) == 250 * MS
        with pytest.raises(EventError, match="at least 100 ms"):
            await committed(50)
        with pytest.raises(EventError, match="the most"):
            await committed(40_000)
        assert len(listener.commit()[0]) == 30_000 * MS

    asyncio.run(run())


def test_a_turn_has_an_end_and_silence_is_forgotten():
    """One who talks on and on is answered after so many seconds; who says nothing costs nothing."""

    async def run():
        listener, _, found = await listened("s" * 70, seconds=1.0)
        stopped = [one for one in found if one[0].change is Change.STOPPED]
        assert [len(samples) for _, samples, _ in stopped] == [INPUT_RATE] * 2
        listener, *_ = await listened("." * 1000)
        assert len(listener.buffer) <= 300 * MS + WINDOW and listener.end == 1000 * WINDOW

    asyncio.run(run())


def test_long_audio_is_decoded_beside_other_clients():
    """In another thread than that of the event loop, which sends what others hear."""
    threads = []

    def decoder(data: bytes, last: bool) -> np.ndarray:
        threads.append(threading.current_thread())
        return np.zeros(len(data), np.float32)

    for length in (LONG - 1, LONG):
        assert len(asyncio.run(decode(decoder, bytes(length)))) == length  # type: ignore
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, False]


@pytest.mark.parametrize(("kind", "encoding"), [("audio/pcmu", "ULAW"), ("audio/pcma", "ALAW")])
def test_formats_of_telephones(kind, encoding):
    """A recording in G.711 is heard as the same recording in 16 bits, but for its upper half."""
    (expected,) = load_turn(EXAMPLES / "sum.wav", "refuse")
    file = io.BytesIO()
    low = np.frombuffer(pcm(EXAMPLES / "sum.wav", 8000), "<i2")
    soundfile.write(file, low, 8000, format="RAW", subtype=encoding)
    heard = Decoder(kind)(file.getvalue(), last=True)
    assert abs(len(heard) - len(expected)) < 10
    length = min(len(heard), len(expected))
    assert np.corrcoef(heard[:length], expected[:length])[0, 1] > 0.9

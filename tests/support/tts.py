"""A program that speaks, for the tests: a tone, 70 ms for each letter, as a wav.

    python tts.py VOICE TEXT_FILE OUT     speaks once
    python tts.py VOICE --lines FOLDER    speaks every line of stdin, and prints the wav's name

The voice is a pitch in Hz, or names a fault: silent, clipped, short, long, empty, none, fail, slow.
With TTS_CALLS, a file, every text is noted there.
"""

import array
import itertools
import math
import os
import sys
import time
import wave
from pathlib import Path

RATE = 16000


def speak(voice: str, text: str, out: Path) -> None:
    """Write the clip of a text, or do what the voice says."""
    if calls := os.environ.get("TTS_CALLS"):
        with open(calls, "a") as file:
            file.write(f"{voice} {text}\n")
    if voice == "fail" or "FAIL" in text:
        sys.exit("warming up\nthis voice always fails")
    if voice == "slow":
        time.sleep(60)
    if voice == "none":
        return
    if voice == "empty":
        out.write_bytes(b"")
        return
    length = {"short": 0.005, "long": 0.5}.get(voice, 0.07)
    size = int(RATE * length * sum(map(str.isalpha, text)))
    pitch = int(voice) if voice.isdigit() else 200
    level = {"silent": 1, "clipped": 40000}.get(voice, 9000)
    samples = (level * math.sin(2 * math.pi * pitch * i / RATE) for i in range(size))
    clip = array.array("h", (max(-32768, min(32767, int(sample))) for sample in samples))
    with wave.open(str(out), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(clip.tobytes())


def main(voice: str, source: str, out: str) -> None:
    if source != "--lines":
        return speak(voice, Path(source).read_text(), Path(out))
    print("loading the model", file=sys.stderr, flush=True)
    for number, line in zip(itertools.count(), sys.stdin, strict=False):
        path = Path(out) / f"{number}.wav"
        speak(voice, line, path)
        print(f"INFO: wrote {path}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

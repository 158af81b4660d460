"""`omni2 synthesize speech`: engines, voices, checks, and manifests that `omni2 prepare` reads."""

import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from omni2_jax import recognisers
from omni2_jax.audio import recordings
from omni2_jax.jobs import Where
from omni2_jax.synthesize import make_speech
from omni2_jax.synthesize.engines import EngineError, open_engine
from omni2_jax.synthesize.make_speech import Shares, payload, synthesize_speech
from omni2_jax.synthesize.records import TextDialogue, TextTurn
from omni2_jax.synthesize.speaker import SpeakerOptions
from omni2_jax.synthesize.voices import EngineEntry, Voice, read_voices
from omni2_jax.train.data import prepare
from omni2_jax.train.data.dataset import Dataset
from tests.support import endpoints, tts
from tests.support.commands import is_error_line
from tests.support.paths import ROOT

PROGRAM = [sys.executable, tts.__file__]
ONCE = {"command": [*PROGRAM, "{voice}", "{text_file}", "{out}"]}
RESIDENT = {"command": [*PROGRAM, "{voice}", "--lines", "{out_dir}"], "keep_running": True}


def voices_file(folder: Path, **changes) -> Path:
    """A voices file of the stand-in program. changes: of its entries."""
    content = {
        "engines": {"tts": ONCE, "kept": RESIDENT},
        "questions": [{"engine": "tts", "voices": ["200", "300"]}],
        "held_out": [{"engine": "tts", "voices": ["400"]}],
        "replies": {"engine": "kept", "voice": "100"},
    }
    path = folder / "voices.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def dialogue(id: str, *turns: tuple[str, str], split: str = "seen") -> TextDialogue:
    made = [TextTurn(*turn, answers=[turn[1]], topic="t") for turn in turns]
    return TextDialogue(id, split, "topic", made)


DIALOGUES = [
    dialogue("sea", ("What color is the sea?", "Blue, I think."), ("And why?", "It is deep.")),
    dialogue("quiet", ("", "I did not hear a question.")),
    dialogue("new", ("Is tea hot or cold?", "It can be either."), split="unseen_values"),
    *(dialogue(f"d{i}", (f"Can you count to {i}?", "Yes, I can.")) for i in range(6)),
]


def write(folder: Path, dialogues=DIALOGUES) -> Path:
    path = folder / "dialogues.jsonl"
    path.write_text("".join(f"{one.to_json()}\n" for one in dialogues))
    return path


def speak(folder: Path, dialogues=DIALOGUES, changes=None, where=None, shares=None, **options):
    """Speak dialogues into FOLDER/out -> the lines of its manifests by their names."""
    out = folder / "out"
    synthesize_speech(
        write(folder, dialogues),
        read_voices(voices_file(folder, **(changes or {}))),
        out,
        SpeakerOptions(**options),
        shares or Shares(0.2, 0.2),
        where or Where(),
        workers=2,
    )
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.glob("*.jsonl")
        if not path.name.startswith("journal")
    }


def test_dialogues_become_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTS_CALLS", str(tmp_path / "calls"))
    made = speak(tmp_path)
    assert made["left_out"] == [] and sum(map(len, made.values())) == len(DIALOGUES)
    printed = capsys.readouterr()
    assert "9 dialogues" in printed.err
    spoken = {line["id"]: line for lines in made.values() for line in lines}
    sea = spoken["sea"]
    assert [turn["text"] for turn in sea["turns"]] == [
        "What color is the sea?",
        "Blue, I think.",
        "And why?",
        "It is deep.",
    ]
    assert sea["turns"][0]["answers"] == ["Blue, I think."] and "answers" not in sea["turns"][1]
    # One voice for the questions of a dialogue, another one for all replies.
    for line in spoken.values():
        pitches = [pitch(tmp_path / "out" / turn["audio"]) for turn in line["turns"]]
        asked = float(line["voice"].removeprefix("tts/"))
        if line["id"] != "quiet":
            np.testing.assert_allclose(pitches[::2], asked, atol=3)
        np.testing.assert_allclose(pitches[1::2], 100, atol=3)
        assert (line["voices"] == "unseen") == (asked == 400)
    assert len({line["voice"] for line in spoken.values()}) == 3
    assert [line["id"] for line in made["train"]] == [
        one.id for one in DIALOGUES if one.id in {line["id"] for line in made["train"]}
    ]
    prepare.prepare(tmp_path / "out" / "train.jsonl", tmp_path / "data")
    data = Dataset(tmp_path / "data")
    assert len(data) == len(made["train"]) and "quiet" in spoken
    for index, line in enumerate(made["train"]):
        turns = data.dialogue(index).turns
        assert [turn.text for turn in turns] == [turn["text"] for turn in line["turns"]]
        clip = recordings.load(tmp_path / "out" / line["turns"][0]["audio"], 16000)
        np.testing.assert_array_equal(data.clip(turns[0].clip), clip)
    # The same command makes nothing again, and the same files.
    calls = (tmp_path / "calls").read_text()
    contents = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert speak(tmp_path) == made
    assert {path: path.read_bytes() for path in contents} == contents
    new = (tmp_path / "calls").read_text().removeprefix(calls)
    assert {line.split(" ", 1)[1] for line in new.splitlines() if line} == {"One, two, three."}


def test_sentences_become_recordings_of_a_voice(tmp_path):
    (tmp_path / "text.txt").write_text("The sea is blue.\n\nThat is FAIL.\nTea is hot.\n")
    absent = [{"engine": "tts", "voices": ["fail"]}]  # no question is asked
    voices = read_voices(voices_file(tmp_path, questions=absent))
    out = tmp_path / "out"
    synthesize_speech(
        tmp_path / "text.txt", voices, out, SpeakerOptions(), Shares(), Where(), workers=2
    )
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["The sea is blue.", "Tea is hot."]
    assert json.loads((out / "left_out.jsonl").read_text())["id"] == "s000002"
    prepare.prepare(out, tmp_path / "data")
    data = Dataset(tmp_path / "data")
    assert [data.dialogue(i).turns[0].text for i in range(2)] == [line["text"] for line in lines]
    assert data.dialogue(0).is_recording


@pytest.mark.parametrize("option", ["--no-replies", "--validation=0.1", "--test=0"])
def test_options_for_dialogues_are_refused_for_sentences(option, omni2, tmp_path):
    (tmp_path / "text.txt").write_text("The sea is blue.\n")
    options = ["--dialogues", tmp_path / "text.txt", "--voices", voices_file(tmp_path), option]
    line, *_ = omni2("synthesize", "speech", *options, "--out", tmp_path / "out")
    assert is_error_line(line) and f"{tmp_path}/text.txt is a file of sentences" in line
    assert option.partition("=")[0] in line and not (tmp_path / "out").exists()


def pitch(path: Path) -> float:
    """The strongest frequency of a recording in Hz."""
    samples = recordings.load(path, 16000)
    return float(np.argmax(np.abs(np.fft.rfft(samples)))) * 16000 / len(samples)


def test_replies_that_stay_text(tmp_path):
    """Without spoken replies, `omni2 prepare` makes a data set of their texts for stage 1a."""
    manifests = speak(tmp_path, shares=Shares(0, 0), replies=False)
    turns = [turn for line in manifests["train"] for turn in line["turns"]]
    assert all(("audio" in turn) == (turn["role"] == "user") for turn in turns)
    prepare.prepare(tmp_path / "out" / "train.jsonl", tmp_path / "data", strict=True)
    data = Dataset(tmp_path / "data")
    replies = [turn for i in range(len(data)) for turn in data.dialogue(i).turns[1::2]]
    assert {turn.text for turn in replies} == {turn["text"] for turn in turns[1::2]}
    assert all(turn.clip is None for turn in replies)


def test_places():
    """By share, and held-out voices only for the test."""
    shares = Shares(0.1, 0.2)
    seen = [payload(dialogue(f"d{i}", ("q", "a")), 0, shares, True) for i in range(2000)]
    counts = {place: sum(one["place"] == place for one in seen) for place in make_speech.PLACES}
    assert abs(counts["validation"] - 200) < 50 and abs(counts["test"] - 400) < 70
    assert all((one["voices"] == "unseen") == (one["place"] == "test") for one in seen)
    other = [
        payload(dialogue(f"d{i}", ("q", "a"), split="unseen_both"), 0, shares, True)
        for i in range(400)
    ]
    assert {one["place"] for one in other} == {"test"}
    assert abs(sum(one["voices"] == "unseen" for one in other) - 200) < 50
    assert payload(dialogue("d0", ("q", "a")), 1, Shares(0, 1), False)["voices"] == "seen"


# ---- clips that cannot be used ----

FAULTS = {
    "silent": ("silent", "nothing is to be heard of 'Is it?'"),
    "clipped": ("clipped", "of the samples of 'Is it?' are at full scale"),
    "short": ("too short", "0.02 s for 'Is it?', expected 0.10 s"),
    "long": ("too long", "2.00 s for 'Is it?', expected 1.40 s"),
}


@pytest.mark.parametrize("voice", FAULTS)
def test_clips_that_fail_a_check(voice, tmp_path, monkeypatch, capsys):
    """The question is asked in another voice; what always fails is left out by name."""
    monkeypatch.setenv("TTS_CALLS", str(tmp_path / "calls"))
    reason, message = FAULTS[voice]
    pool = [{"engine": "tts", "voices": [voice]}]
    asked = [dialogue("ask", ("Is it?", "Yes, it is."))]
    made = speak(tmp_path, asked, {"questions": pool})
    [left_out] = made["left_out"]
    assert (left_out["id"], left_out["reason"]) == ("ask", reason)
    assert f"question in the voice tts/{voice}: " in left_out["message"]
    assert message in left_out["message"]
    assert (tmp_path / "calls").read_text().count("Is it?") == 3
    assert f"1 refused: 1 x {reason} (first: ask: " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    pool = [{"engine": "tts", "voices": [voice, "200"]}]
    made = speak(tmp_path, asked, {"questions": pool}, attempts=20)
    [line] = [line for lines in made.values() for line in lines]
    assert line["voice"] == "tts/200"


class Deaf:
    """A recogniser that hears another text now and then, or fails."""

    workers = 1

    def __init__(self, *texts: str | Exception):
        self.texts = list(texts)

    def transcribe(self, samples: np.ndarray, rate: int) -> str:
        assert samples.ndim == 1 and rate in (16000, 24000)
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        return text


def test_what_a_recogniser_hears(tmp_path, monkeypatch):
    asked = [dialogue("ask", ("Is it 7?", "Yes, it is."))]
    heard = Deaf("nothing at all", "is it seven", "yes it was", "Yes, it's")
    monkeypatch.setattr(recognisers, "open_recogniser", lambda *_: heard)
    made = speak(tmp_path, asked, recogniser="whisper", max_wer=0.3)
    [line] = [line for lines in made.values() for line in lines]
    assert [turn["wer"] for turn in line["turns"]] == [0.0, 0.0] and not heard.texts
    shutil.rmtree(tmp_path / "out")
    heard.texts += ["is it seven"] + ["no"] * 3
    [left_out] = speak(tmp_path, asked, recogniser="whisper")["left_out"]
    assert left_out["reason"] == "heard wrong"
    assert left_out["message"] == "reply: 'Yes, it is.' is heard as 'no': 100% word errors"


def test_a_recogniser_that_fails(tmp_path, monkeypatch):
    """At one clip: it is made again, or left out. At all of them, or as a whole: the job ends."""
    asked, cannot = [dialogue("ask", ("Is it 7?", "Yes, it is."))], ValueError("(400: too short)")
    heard = Deaf(cannot, "is it seven", *[cannot] * 3)
    monkeypatch.setattr(recognisers, "open_recogniser", lambda *_: heard)
    [left_out] = speak(tmp_path, asked, recogniser="whisper")["left_out"]
    assert (left_out["reason"], left_out["message"]) == (
        "not recognised",
        "reply: 'Yes, it is.': (400: too short)",
    )
    shutil.rmtree(tmp_path / "out")
    for failures, words in (
        ([RuntimeError("http://a/v1 refuses the key")], "refuses the key"),
        ([cannot] * 30, r"failed at 30 clips in a row; the last one: \(400: too short\)"),
    ):
        heard.texts = failures
        with pytest.raises(RuntimeError, match=words):
            speak(tmp_path, asked, recogniser="whisper", attempts=30)


# ---- engines ----


def test_a_failing_program(tmp_path):
    """Its message is the refusal's; when nothing works any more, the job ends."""
    asked = [dialogue("ask", ("Is it FAIL?", "Yes, it is.")), dialogue("b", ("Is it?", "Yes."))]
    made = speak(tmp_path, asked)
    assert [one["id"] for one in made["left_out"]] == ["ask"]
    assert made["left_out"][0]["reason"] == "no clip"
    assert "failed (1): this voice always fails" in made["left_out"][0]["message"]
    shutil.rmtree(tmp_path / "out")
    asked = [dialogue(f"a{i}", ("Is it?", "Yes, FAIL.")) for i in range(40)]
    with pytest.raises(
        RuntimeError, match=r"30 clips in a row .* by the engine kept: .* ended: thi"
    ):
        speak(tmp_path, asked, {"questions": [{"engine": "kept", "voices": ["fine"]}]}, attempts=20)


BROKEN = {
    "fail": "failed (1): this voice always fails",
    "none": "no wav was written; the program said: nothing",
    "empty": "speech.wav is not audio that can be read",
    "slow": "took more than 0.5 s",
}


@pytest.mark.parametrize("voice", BROKEN)
def test_voices_are_probed(voice, tmp_path):
    changes = {
        "engines": {"tts": ONCE | {"timeout": 0.5}, "kept": RESIDENT},
        "held_out": [{"engine": "tts", "voices": [voice]}],
    }
    with pytest.raises(ValueError) as error:
        speak(tmp_path, changes=changes)
    assert f"engine tts, voice {voice!r}: " in str(error.value)
    assert BROKEN[voice] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_program_that_keeps_running(tmp_path, monkeypatch):
    """One process speaks many lines; one that dies is started again."""
    monkeypatch.setenv("TTS_CALLS", str(tmp_path / "calls"))
    engine = pickle.loads(pickle.dumps(open_engine("kept", EngineEntry(**RESIDENT))))
    voice = Voice("kept", "250")
    first = engine.speak("How are\nyou?", voice, 0, 16000)
    [resident] = engine.idle[voice]
    np.testing.assert_array_equal(engine.speak("How are you?", voice, 0, 16000), first)
    assert engine.idle[voice] == [resident]
    assert not list(Path(resident.folder.name).iterdir())
    with pytest.raises(EngineError, match=r"ended: this voice always fails"):
        engine.speak("FAIL", voice, 0, 16000)
    assert engine.idle[voice] == [] and resident.process.returncode is not None
    assert not Path(resident.folder.name).exists()
    np.testing.assert_array_equal(engine.speak("How are you?", voice, 0, 16000), first)
    engine.idle[voice][0].close()
    slow = open_engine("kept", EngineEntry(**RESIDENT | {"timeout": 0.5}))
    with pytest.raises(EngineError, match=r"took more than 0.5 s"):
        slow.speak("How are you?", Voice("kept", "slow"), 0, 16000)


def test_a_text_is_no_option():
    """No shell reads it, and a dash begins no option."""
    command = [sys.executable, "-c", "import sys; sys.exit(repr(sys.argv[1:]))", "{text}", "{out}"]
    engine = open_engine("tts", EngineEntry(command=command))
    with pytest.raises(EngineError, match=r"' -h \$HOME; `ls` \{voice\}'"):
        engine.speak("-h $HOME; `ls` {voice}", Voice("tts", "v"), 0, 16000)


def test_an_endpoint(tmp_path):
    with endpoints.serve(faults={endpoints.SPEECH: [None, None, "500", "429", "cut"]}) as server:
        entry = {"endpoint": server.url, "model": "standin", "settings": {"speed": [1.0]}}
        changes = {
            "engines": {"tts": ONCE, "server": entry},
            "questions": [{"engine": "server", "voices": ["anna"]}],
            "replies": {"engine": "server", "voice": "ben"},
        }
        made = speak(tmp_path, DIALOGUES[:1], changes, shares=Shares(0, 0))
        [line] = made["train"]
        assert line["voice"] == "server/anna"
        asked = [body for route, body in server.requests if route == endpoints.SPEECH]
        assert {body["voice"] for body in asked[:2]} == {"ben", "anna"}  # the probes
        assert {body["speed"] for body in asked[2:]} == {1.0}
        samples = recordings.load(tmp_path / "out" / line["turns"][1]["audio"], 24000)
        expected = len("Blue, I think.") * 0.06 * 24000
        assert abs(len(samples) - expected) < 2
        shutil.rmtree(tmp_path / "out")
        server.always[endpoints.SPEECH] = "400"
        with pytest.raises(ValueError, match=r"engine server, voice 'ben': .* the request failed"):
            speak(tmp_path, DIALOGUES[:1], changes)
        entry["model"] = "other"
        with pytest.raises(ValueError, match=r"engine server: .* has no model 'other'"):
            speak(tmp_path, DIALOGUES[:1], changes)
    entry["timeout"] = 1
    with pytest.raises(ValueError, match=r"engine server: http.* cannot be reached"):
        speak(tmp_path, DIALOGUES[:1], changes)
    assert not (tmp_path / "out").exists()


REAL = {
    "espeak-ng": ("espeak", "en-gb+f2", "en-gb+nobody", "en-xx"),
    "flite": ("flite", "awb", "nobody", "alan"),
}


@pytest.mark.parametrize("program", REAL)
def test_real_programs(program, tmp_path):
    """The commands of recipes/nano/voices.yaml; voices that do not exist are found by the lists."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    name, voice, *absent = REAL[program]
    content = yaml.safe_load((ROOT / "recipes" / "nano" / "voices.yaml").read_text())
    entry = content["engines"][name]
    pool = next(one for one in content["questions"] if one["engine"] == name)
    changes = {
        "engines": {name: entry},
        "questions": [{"engine": name, "voices": [voice]}],
        "held_out": [],
        "replies": {"engine": name, "voice": pool["voices"][0]},
        "augment": content["augment"],
    }
    made = speak(tmp_path, DIALOGUES[:3], changes)
    assert made["left_out"] == [] and sum(map(len, made.values())) == 3
    engine = open_engine(name, EngineEntry(**entry))
    for other in absent:
        missing = other.split("+")[-1]
        with pytest.raises(ValueError, match=rf"engine {name} lists no voice '{missing}'"):
            engine.check([voice, other])


# ---- the voices file ----

FILES = {
    "no program": ({"engines": {"tts": {"command": ["nosuch", "{text}", "{out}"]}}},
                   "engine tts: there is no program 'nosuch'"),
    "no engine": ({"replies": {"engine": "gone", "voice": "x"}},
                  "there is no engine 'gone'; engines are kept, tts"),
    "both": ({"engines": {"tts": ONCE | {"endpoint": "http://a/v1"}}},
             ":10:3: engines.tts: expected either a command or an endpoint"),
    "unknown name": ({"engines": {"tts": {"command": ["x", "{txt}", "{out}"]}}},
                     "its command has {txt}, expected one of out, out_dir, seed, text"),
    "no out": ({"engines": {"tts": {"command": ["x", "{text}"]}}}, "its command lacks {out}"),
    "no text": ({"engines": {"tts": {"command": ["x", "{out}"]}}},
                "its command lacks {text} or {text_file}"),
    "a brace": ({"engines": {"tts": {"command": ["x", "{text", "{out}"]}}}, "expected '}'"),
    "a setting": ({"engines": {"tts": {"endpoint": "http://a/v1", "settings": {"pitch": [1]}}}},
                  "an endpoint has no setting 'pitch', only speed"),
    "a voice twice": ({"held_out": [{"engine": "tts", "voices": ["300"]}]},
                      "the voice '300' of tts is among questions and held_out"),
    "a variable": ({"replies": {"engine": "tts", "voice": "${NO_SUCH}"}},
                   "the environment variable NO_SUCH is not set"),
    "a range": ({"augment": {"noise": [30, 5]}},
                "noise is [30.0, 5.0], expected a range within -10 to 100"),
    "a key": ({"replys": 1}, "replys is not the name of a setting"),
    "an empty pool": ({"questions": []}, "questions is"),
}  # fmt: skip


@pytest.mark.parametrize("changes, says", FILES.values(), ids=FILES)
def test_faults_of_a_voices_file(changes, says, tmp_path):
    engines = {"tts": ONCE, "kept": RESIDENT} | changes.get("engines", {})
    with pytest.raises(ValueError) as error:
        speak(tmp_path, changes=changes | {"engines": engines})
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "voices.yaml") in str(error.value) or "engine tts" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_voices_of_the_recipe(monkeypatch):
    monkeypatch.setenv("PIPER_VOICE", "joe.onnx")
    voices = read_voices(ROOT / "recipes" / "nano" / "voices.yaml")
    assert voices.reply_voice() == Voice("piper", "joe.onnx")
    assert str(Voice("piper", "/voices/joe.onnx")) == "piper/joe.onnx"
    assert read_voices(
        ROOT / "recipes" / "nano" / "voices.yaml", "amy.onnx"
    ).reply_voice().name == ("amy.onnx")
    drawn = {voices.draw(random.Random(i), held_out=False)[:2] for i in range(3000)}
    held_out = {voices.draw(random.Random(i), held_out=True)[:2] for i in range(300)}
    assert len(held_out) == 5 and len(drawn) > 100 and not drawn & held_out
    settings = dict(voices.draw(random.Random(1), held_out=True).settings)
    assert all(value in voices.engines["flite"].settings.get(name, (value,))
               for name, value in settings.items())  # fmt: skip


def test_no_dialogues(tmp_path):
    with pytest.raises(ValueError, match=r"dialogues.jsonl holds no dialogues"):
        speak(tmp_path, [])
    assert not (tmp_path / "out").exists()


def test_other_voices_need_another_directory(tmp_path):
    speak(tmp_path, DIALOGUES[:1])
    with pytest.raises(ValueError, match=r"was begun with seed 0, not 1"):
        speak(tmp_path, DIALOGUES[:1], seed=1)
    with pytest.raises(ValueError, match=r"was begun with voices '"):
        speak(tmp_path, DIALOGUES[:1], {"held_out": []})


def test_a_variable_with_another_voice_needs_another_directory(tmp_path, monkeypatch):
    """But a server may be at another address."""
    engines = {"tts": ONCE, "server": {"endpoint": "http://$HOST:1/v1"}}
    voice = {"engine": "tts", "voice": "$VOICE"}
    changes = {"engines": engines, "replies": voice}
    for name, value in {"HOST": "a", "VOICE": "100"}.items():
        monkeypatch.setenv(name, value)
    speak(tmp_path, DIALOGUES[:1], changes)
    monkeypatch.setenv("HOST", "b")
    speak(tmp_path, DIALOGUES[:1], changes)
    monkeypatch.setenv("VOICE", "150")
    with pytest.raises(ValueError, match=r"was begun with voices '"):
        speak(tmp_path, DIALOGUES[:1], changes)


@pytest.mark.skipif("OMNI2_WHISPER" not in os.environ, reason="OMNI2_WHISPER names no model")
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_whisper_hears_a_real_voice(tmp_path):
    command = ["espeak-ng", "-v", "{voice}", "-w", "{out}", "-f", "{text_file}"]
    changes = {
        "engines": {"espeak": {"command": command}},
        "questions": [{"engine": "espeak", "voices": ["en-us"]}],
        "held_out": [],
        "replies": {"engine": "espeak", "voice": "en-us"},
    }
    asked = [dialogue("a", ("What is the capital of France?", "The capital is Paris."))]
    made = speak(tmp_path, asked, changes, recogniser=os.environ["OMNI2_WHISPER"], max_wer=0.4)
    [line] = [line for lines in made.values() for line in lines]
    assert [turn["wer"] <= 0.4 for turn in line["turns"]] == [True, True]

"""The `omni2` command: what it writes and prints, and every foreseen failure as one line that leaves nothing behind."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni2_jax.audio import recordings
from omni2_jax.cli.main import main
from omni2_jax.generate import omni2 as omni2_module
from omni2_jax.generate.omni2 import Omni2
from tests.support.commands import assert_refused, chat, process
from tests.support.conversations import CASES, GREEDY, clip
from tests.support.releases import linked, replace

SPEECH = clip("speech_a")
refused = functools.partial(assert_refused, allowed={"in.wav", "in.json", "ckpt"})


@pytest.fixture
def omni2(monkeypatch, capsys):
    """Run the command in this process -> (exit code or the line of its error, stdout, stderr)."""

    def run(*args: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["omni2", *map(str, args)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def loaded(monkeypatch, model, text_model, checkpoint_dir):
    """The checkpoint is in memory already."""
    monkeypatch.setattr(
        Omni2, "load", lambda directory, decoder=True, mesh=None: model if decoder else text_model
    )
    return checkpoint_dir


def write_questions(path: Path, *conversations: list) -> Path:
    """Items named q0, q1, ...; paths are the user's turns, texts the model's."""
    turns = lambda talk: [
        {"from": "gpt", "text": t} if isinstance(t, str) else {"from": "human", "speech": str(t)}
        for t in talk
    ]
    path.write_text(
        json.dumps(
            [{"id": f"q{i}", "conversation": turns(talk)} for i, talk in enumerate(conversations)]
        )
    )
    return path


# --- what it does


def test_answer_to_a_wav(omni2, loaded, model, tmp_path):
    code, out, err = omni2(*chat(loaded, SPEECH, "--out", tmp_path / "answer.wav"))
    assert code == 0 and out == CASES["A"]["text"].strip() + "\n"
    samples, rate = soundfile.read(tmp_path / "answer.wav", dtype="int16")
    answer = model.answer(SPEECH, options=GREEDY)
    assert rate == 24000 and len(answer.waveform) == 960 * len(answer.units)
    np.testing.assert_array_equal(samples, recordings.to_int16(answer.waveform, 32767))
    assert f"{len(answer.units)} units, {len(samples) / 24000:.2f} s of speech" in err
    assert os.listdir(tmp_path) == ["answer.wav"]


def test_conversation_and_streaming(omni2, loaded, model, tmp_path):
    """Two turns, written as they are made: the files of `NAME-1.wav`, and times on stderr."""
    code, out, err = omni2(
        *chat(loaded, SPEECH, clip("speech_b"), "--stream", "--out", tmp_path / "a.wav")
    )
    session = model.session(options=GREEDY, turns=2)
    for i, wav in enumerate((SPEECH, clip("speech_b"))):
        replies = list(session.respond(wav))
        samples, _ = soundfile.read(tmp_path / f"a-{i + 1}.wav", dtype="int16")
        np.testing.assert_array_equal(
            samples,
            np.concatenate([recordings.to_int16(reply.samples, 32767) for reply in replies]),
        )
        assert "".join(reply.text for reply in replies) in out
    assert code == 0 and sorted(os.listdir(tmp_path)) == ["a-1.wav", "a-2.wav"]
    for line in (
        "time to first audio",
        "real-time factor",
        "hearing",
        "prefill",
        "first step",
        "later steps",
    ):
        assert err.count(line) == 2
    code, again, err = omni2(*chat(loaded, SPEECH, clip("speech_b"), "--no-wav"))
    assert code == 0 and again == out and str(clip("speech_b")) in err.replace("\n", "")


def test_interrupted_stream_leaves_no_file(omni2, loaded, model, tmp_path, monkeypatch):
    def fail(writer, samples):
        raise OSError("no space left on device")

    monkeypatch.setattr(recordings.WavWriter, "write", fail)
    out = tmp_path / "a.wav"
    code, _, _ = omni2(*chat(loaded, SPEECH, "--stream", "--out", out))
    assert code == f"error: cannot write {out}: no space left on device"
    assert os.listdir(tmp_path) == []


def test_questions_in_batches(omni2, loaded, tmp_path):
    """Conversations of different lengths, three at once: the lines and files of one by one, in order."""
    given = write_questions(
        tmp_path / "questions.json", [SPEECH], [clip("speech_b"), CASES["B"]["conversation"][1]["text"], clip("synth_c")],
        [clip("synth_c"), "Yes.", clip("short_d")], [clip("short_d")],
    )  # fmt: skip
    for out, flags in {"one": ["--no-wav"], "three": ["--batch", 3]}.items():
        code, _, err = omni2(
            *chat(loaded, "--questions", given, "--out-dir", tmp_path / out, *flags)
        )
        assert code == 0 and "4/4" in err
    lines = (tmp_path / "three" / "answers.jsonl").read_text()
    assert lines == (tmp_path / "one" / "answers.jsonl").read_text()
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["question_id"] for answer in answers] == ["q0", "q1", "q2", "q3"]
    assert answers[0] == {
        "question_id": "q0",
        "prediction": CASES["A"]["text"].strip(),
        "prediction_units": CASES["A"]["prediction_units"],
    }
    assert os.listdir(tmp_path / "one") == ["answers.jsonl"]
    for answer in answers:
        samples, _ = soundfile.read(tmp_path / "three" / f"{answer['question_id']}.wav")
        assert len(samples) == 960 * answer["prediction_units"].count("<")


def test_answer_without_speech(omni2, loaded, tmp_path, monkeypatch):
    """A text whose first token ends it, and a speech LM that ends at once: there is nothing to write, and that is no failure."""
    silent = lambda replies, spoken: (
        list(replies),
        omni2_module.Answer("so", [], "", np.zeros(0, np.float32)),
    )[1]
    monkeypatch.setattr(omni2_module, "join", silent)
    code, _, err = omni2(*chat(loaded, SPEECH, "--out", tmp_path / "a.wav"))
    assert code == 0 and "no speech" in err and os.listdir(tmp_path) == []


def test_long_turns(omni2, loaded, tmp_path):
    """40 s: refused, cut at 30 s, or heard as two clips."""
    long, start = tmp_path / "long.wav", tmp_path / "start.wav"
    samples = np.tile(soundfile.read(SPEECH)[0], 40)[: 40 * 16000]
    soundfile.write(long, samples, 16000)
    soundfile.write(start, samples[: 30 * 16000], 16000)
    assert (
        omni2(*chat(loaded, long, "--no-wav"))[0]
        == f"error: {long} is 40.00 s long; at most 30 s fit: truncate it, or split it"
    )
    given = write_questions(tmp_path / "questions.json", [SPEECH], [long])
    assert (
        "is 40.00 s long"
        in omni2(*chat(loaded, "--questions", given, "--out-dir", tmp_path / "out"))[0]
    )
    assert not (tmp_path / "out").exists()
    truncated, whole = (
        omni2(*chat(loaded, wav, "--no-wav", "--truncate"))[:2] for wav in (long, start)
    )
    split = omni2(*chat(loaded, long, "--no-wav", "--split-long"))
    assert truncated == whole and split[0] == 0 and split[1] not in ("\n", whole[1])


def test_info(omni2, checkpoint_dir):
    code, out, _ = omni2("info", checkpoint_dir)
    assert code == 0
    for fact in (
        "speech_encoder",
        "speech_lm",
        "R = 3 text tokens, W = 10 units",
        "voices: espeak",
        "at most 4096 positions",
    ):
        assert fact in out


# --- the real thing


def test_raw_audio_on_stdout(checkpoint_dir, model):
    """Nothing but samples on stdout; the text goes to stderr."""
    done = process(*chat(checkpoint_dir, SPEECH, "--stream", "--out", "-"))
    answer = model.answer(SPEECH, options=GREEDY)
    assert (
        done.returncode == 0
        and done.stdout == recordings.to_int16(answer.waveform, 32767).astype("<i2").tobytes()
    )
    assert answer.text in done.stderr.decode()


def test_failure_of_the_process(checkpoint_dir, tmp_path):
    """A damaged parameter file, which four libraries have to say something about: one line on stderr, exit code 1."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_dir, broken)
    data = max(
        (path for path in (broken / "params" / "llm").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    done = process(*chat(broken, SPEECH, "--out", tmp_path / "answer.wav"))
    assert done.returncode == 1 and done.stdout == b""
    assert (
        done.stderr.decode().count("\n") == 1
        and done.stderr.startswith(b"error: ")
        and str(broken / "params" / "llm") in done.stderr.decode()
    )
    assert os.listdir(tmp_path) == ["broken"]


# --- failures


def wav(path: Path, samples, **how) -> None:
    soundfile.write(path, np.asarray(samples, np.float32), 16000, format="WAV", **how)


BAD_AUDIO = {
    "is not audio": lambda path: path.write_text("This is a text.\n" * 100),
    "is not audio that can be read": lambda path: path.write_bytes(b""),
    "is empty: it holds no samples": lambda path: wav(path, []),
    "is cut short": lambda path: (shutil.copy(SPEECH, path), os.truncate(path, 20000)),
    "holds 2 NaN or infinite samples": lambda path: wav(
        path, [0, np.nan, 1, np.inf], subtype="FLOAT"
    ),
    "Is a directory": lambda path: path.mkdir(),
    "No such file": lambda path: None,
}


@pytest.mark.parametrize("message", BAD_AUDIO)
def test_bad_audio(omni2, tmp_path, message):
    """Told before the checkpoint is even looked at, for a question as for an item of a list."""
    bad = tmp_path / "in.wav"
    BAD_AUDIO[message](bad)
    refused(
        omni2(*chat(tmp_path / "nowhere", SPEECH, bad, "--out", tmp_path / "a.wav")),
        tmp_path,
        "in.wav",
        message,
    )
    given = write_questions(tmp_path / "in.json", [SPEECH], [SPEECH, "Yes.", bad])
    refused(
        omni2(*chat(tmp_path / "nowhere", "--questions", given, "--out-dir", tmp_path / "out")),
        tmp_path,
        "in.wav",
        message,
    )


def without(name: str):
    return lambda ckpt: (shutil.rmtree if (ckpt / name).is_dir() else Path.unlink)(ckpt / name)


def damaged(name: str, content: str):
    return lambda ckpt: replace(ckpt / name, content)


BAD_CHECKPOINT = {
    "has no config.json": without("config.json"),
    "config.json is not an omni2-jax config: read is 'three', expected": damaged(
        "config.json", '{"read": "three"}'
    ),
    "tokenizer has no tokenizer: expected tokenizer.json": without("tokenizer"),
    "tts_tokenizer is not a readable tokenizer": damaged("tts_tokenizer/tokenizer.json", "{}"),
    "lacks vocoder: add it with `omni2 convert` from a decoder with --decoder": without(
        "params/vocoder"
    ),
    "needs a voice; it has none": without("voices"),
    "generation_config.json is not JSON": damaged("generation_config.json", "{"),
    "generation_config.json holds no settings": damaged("generation_config.json", "[1]"),
}


@pytest.mark.parametrize("message", BAD_CHECKPOINT)
def test_bad_checkpoint(omni2, checkpoint_dir, tmp_path, message):
    ckpt = linked(checkpoint_dir, tmp_path / "ckpt")
    BAD_CHECKPOINT[message](ckpt)
    refused(omni2(*chat(ckpt, SPEECH, "--out", tmp_path / "a.wav")), tmp_path, str(ckpt), message)
    given = write_questions(tmp_path / "in.json", [SPEECH])
    refused(
        omni2(*chat(ckpt, "--questions", given, "--out-dir", tmp_path / "out")),
        tmp_path,
        str(ckpt),
        message,
    )


def test_no_checkpoint(omni2, goldens, tmp_path):
    for ckpt in (tmp_path / "nowhere", tmp_path, SPEECH):
        refused(omni2(*chat(ckpt, SPEECH, "--no-wav")), tmp_path, str(ckpt))
        refused(omni2("info", ckpt), tmp_path, str(ckpt))
    refused(
        omni2(*chat(goldens / "omni2", SPEECH, "--no-wav")),
        tmp_path,
        str(goldens / "omni2"),
        "is not an omni2-jax config",
    )


def test_voice(omni2, loaded, checkpoint_dir, tmp_path):
    known = (
        f"error: voice 'nobody' is neither a file nor a voice of {checkpoint_dir}; it has espeak"
    )
    given = write_questions(tmp_path / "in.json", [SPEECH])
    for args in (
        [SPEECH, "--out", tmp_path / "a.wav"],
        [SPEECH, "--stream"],
        ["--questions", given, "--out-dir", tmp_path / "out"],
    ):
        result = omni2(*chat(loaded, *args, "--voice", "nobody"))
        refused(result, tmp_path)
        assert result[0] == known


def test_unwritable_output(omni2, tmp_path):
    given = write_questions(tmp_path / "in.json", [SPEECH])
    for args, word in (
        ([SPEECH, "--out", tmp_path], "is a directory"),
        ([SPEECH, "--out", tmp_path / "no" / "a.wav"], f"{tmp_path / 'no'} is not a directory"),
        (
            [SPEECH, SPEECH, "--stream", "--out", tmp_path / "no" / "a.wav"],
            f"{tmp_path / 'no'} is not a directory",
        ),
        (["--questions", given, "--out-dir", given], "is not a directory"),
        (["--questions", given, "--out-dir", given / "deeper"], "is not a directory"),
    ):
        refused(omni2(*chat(tmp_path / "nowhere", *args)), tmp_path, word)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "answers.jsonl").touch()
    refused(
        omni2(*chat("nowhere", "--questions", given, "--out-dir", tmp_path / "ckpt")),
        tmp_path,
        "exists already",
    )


HUMAN = {"from": "human", "speech": str(SPEECH)}
BAD_QUESTIONS = [
    ("", "cannot read"),
    ("[{]", "cannot read"),
    ("\xff", "cannot read"),
    ("[" * 100_000, "nested too deeply"),
    ("{}", "holds no list"),
    ("[]", "holds no list"),
    (["question"], "item 0 has no id or no conversation"),
    ([{"id": "a"}], "item 0 has no id or no conversation"),
    ([{"id": "a", "conversation": 5}], "item 0 has no id or no conversation"),
    ([{"conversation": [HUMAN]}], "item 0 has no id or no conversation"),
    (
        [{"id": "a", "conversation": []}],
        "item 0 (a): the conversation does not end with the user's turn",
    ),
    (
        [{"id": "a", "conversation": [HUMAN]}, {"id": "b", "conversation": [HUMAN, {"text": "b"}]}],
        "item 1 (b): the conversation does not",
    ),
    ([{"id": "a", "conversation": [{"text": "a"}]}], "item 0 (a): turn 0 has no 'speech'"),
    ([{"id": "a", "conversation": [HUMAN, HUMAN, HUMAN]}], "item 0 (a): turn 1 has no 'text'"),
    ([{"id": "a", "conversation": ["speech"]}], "item 0 (a): turn 0 has no 'speech'"),
    ([{"id": "a", "conversation": [HUMAN]}] * 2, "id 'a' is used twice"),
    ([{"id": "../a", "conversation": [HUMAN]}], "cannot be a file's name"),
    ([{"id": "", "conversation": [HUMAN]}], "cannot be a file's name"),
]


@pytest.mark.parametrize(("content", "message"), BAD_QUESTIONS)
def test_bad_questions(omni2, tmp_path, content, message):
    given = tmp_path / "in.json"
    given.write_bytes(
        (content if isinstance(content, str) else json.dumps(content)).encode("latin-1")
    )
    refused(
        omni2(*chat("nowhere", "--questions", given, "--out-dir", tmp_path / "out")),
        tmp_path,
        message,
    )


def test_contradictions(omni2, tmp_path):
    for args, word in (
        ([], "nothing to answer"),
        ([SPEECH, "--questions", "q.json", "--out-dir", "out"], "neither wav files"),
        (["--questions", "q.json"], "--out-dir"),
        ([SPEECH, "--truncate", "--split-long"], "exclude each other"),
        ([SPEECH, "--no-wav", "--out", tmp_path / "a.wav"], "exclude each other"),
        ([SPEECH, "--out", "-"], "needs --stream"),
        ([SPEECH, "--unit-vocabulary", "some"], "expected 'units' or 'all'"),
        ([SPEECH, "--repetition-penalty", 0], "--repetition-penalty"),
    ):
        refused(omni2(*chat("nowhere", *args)), tmp_path, word)
    for usage in (
        ["chat", SPEECH],
        ["chat", "--checkpoint"],
        chat("x", "--max-new-tokens", 0),
        chat("x", "--temperature", "nan"),
    ):
        refused(omni2(*usage), tmp_path, "--")


def test_ctrl_c(omni2, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recordings, "load", interrupted)
    assert omni2(*chat("nowhere", SPEECH))[0] == 130

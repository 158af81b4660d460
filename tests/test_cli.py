"""The `omni2` command: what it writes and prints, and its failures, each one line on stderr."""

import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from omni2_jax.audio import recordings
from omni2_jax.cli.main import main
from omni2_jax.generate import omni2 as omni2_module
from omni2_jax.generate.omni2 import Omni2
from tests.support.commands import assert_refused, chat, process
from tests.support.conversations import CASES, GREEDY, SHORT, clip, three_slots
from tests.support.releases import linked, replace

SPEECH = clip("speech_a")
# Every step with sound takes half a second of computing.
LIMITS = ["--max-new-tokens", 12, "--max-flush-units", 15]
LIMITED = dataclasses.replace(GREEDY, **SHORT)
refused = functools.partial(assert_refused, allowed={"in.wav", "in.json", "ckpt"})


@pytest.fixture
def loaded(monkeypatch, model, text_model, checkpoint_dir):
    """The checkpoint is in memory already, and its engines of three slots answer all questions."""
    monkeypatch.setattr(
        Omni2,
        "load",
        lambda directory, decoder=True, mesh=None, speech=True: model if decoder else text_model,
    )
    with three_slots(model), three_slots(text_model):
        yield checkpoint_dir


def write_questions(path: Path, *conversations: list) -> Path:
    """Items named q0, q1, ...; paths are the user's turns, texts the model's."""

    def turn(content: Path | str) -> dict[str, str]:
        if isinstance(content, str):
            return {"from": "gpt", "text": content}
        return {"from": "human", "speech": str(content)}

    items = [
        {"id": f"q{i}", "conversation": [turn(content) for content in contents]}
        for i, contents in enumerate(conversations)
    ]
    path.write_text(json.dumps(items))
    return path


# --- what it does


def test_answer_to_a_wav(omni2, loaded, model, tmp_path):
    """The answer of `Omni2.answer`. test_questions_in_batches compares with a released one."""
    code, out, err = omni2(*chat(loaded, SPEECH, *LIMITS, "--out", tmp_path / "answer.wav"))
    samples, rate = soundfile.read(tmp_path / "answer.wav", dtype="int16")
    answer = model.answer(SPEECH, options=LIMITED)
    assert code == 0 and out == answer.text + "\n" != "\n"
    assert rate == 24000 and len(answer.waveform) == 960 * len(answer.units)
    np.testing.assert_array_equal(samples, recordings.to_int16(answer.waveform, 32767))
    assert f"{len(answer.units)} units, {len(samples) / 24000:.2f} s of speech" in err
    assert os.listdir(tmp_path) == ["answer.wav"]


@pytest.mark.slow
def test_speak(omni2, loaded, model, warm_engine, tmp_path, monkeypatch):
    """A text to a wav, from the engine that other tests have compiled."""
    command = ["speak", "--checkpoint", loaded, "--max-flush-units", 15, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "engine", lambda options, prompt: warm_engine)
        code, _, err = omni2(*command, tmp_path / "a.wav", "Good evening.")
        for text, message in {" ": "no text to say", "a<|im_end|>": "special token"}.items():
            assert message in omni2(*command, tmp_path / "b.wav", text)[0]
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert code == 0 and rate == 24000 and f"{len(samples) / 24000:.2f} s of speech" in err
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.slow
def test_conversation_and_streaming(omni2, loaded, model, tmp_path):
    """Two turns, written as they are made: the files of `NAME-1.wav`, and times on stderr."""
    code, out, err = omni2(
        *chat(loaded, SPEECH, clip("speech_b"), *LIMITS, "--stream", "--out", tmp_path / "a.wav")
    )
    session = model.session(options=LIMITED, turns=2)
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
    code, again, err = omni2(*chat(loaded, SPEECH, clip("speech_b"), *LIMITS, "--no-wav"))
    assert code == 0 and again == out and str(clip("speech_b")) in err.replace("\n", "")


def test_interrupted_stream_leaves_no_file(omni2, loaded, model, tmp_path, monkeypatch):
    def fail(writer, samples):
        raise OSError("no space left on device")

    monkeypatch.setattr(recordings.WavWriter, "write", fail)
    out = tmp_path / "a.wav"
    code, _, _ = omni2(*chat(loaded, SPEECH, *LIMITS, "--stream", "--out", out))
    assert code == f"error: cannot write {out}: no space left on device"
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_questions_in_batches(omni2, loaded, tmp_path):
    """Conversations of different lengths, three at once: the same lines and files as one by one."""
    given = write_questions(
        tmp_path / "questions.json",
        [SPEECH],
        [clip("speech_b"), CASES["B"]["conversation"][1]["text"], clip("synth_c")],
        [clip("synth_c"), "Yes.", clip("short_d")],
        [clip("short_d")],
    )
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


@pytest.mark.slow
def test_answer_without_speech(omni2, loaded, tmp_path, monkeypatch):
    """The first text token ends the text, and there is no unit: no file, and no failure."""

    def silent(replies, spoken: bool) -> omni2_module.Answer:
        list(replies)
        return omni2_module.Answer("so", [], "", np.zeros(0, np.float32))

    monkeypatch.setattr(omni2_module, "join", silent)
    code, _, err = omni2(*chat(loaded, SPEECH, *LIMITS, "--out", tmp_path / "a.wav"))
    assert code == 0 and "no speech" in err and os.listdir(tmp_path) == []


def test_long_turns(omni2, loaded, tmp_path):
    """40 s: refused, cut at 30 s, or split into two segments."""
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
        omni2(*chat(loaded, wav, *LIMITS, "--no-wav", "--truncate"))[:2] for wav in (long, start)
    )
    split = omni2(*chat(loaded, long, *LIMITS, "--no-wav", "--split-long"))
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


@pytest.mark.slow
def test_square_brackets_in_names(omni2, loaded, tmp_path):
    """They are no markup: of recordings, of the answer's file, and of a checkpoint."""
    folder = tmp_path / "[" / "]x"  # "[/]x" on the command line
    folder.mkdir(parents=True)
    sounds = [folder / name for name in ("[bold]a.wav", "[red].wav")]
    for sound in sounds:
        shutil.copy(clip("short_d"), sound)
    limits = ["--max-new-tokens", 3, "--max-flush-units", 4]
    code, _, err = omni2(*chat(loaded, *sounds, *limits, "--out", folder / "[b].wav"))
    assert code == 0
    for name in (*sounds, folder / "[b]-1.wav", folder / "[b]-2.wav"):
        assert str(name) in err.replace("\n", "") and name.exists()
    missing = folder / "[i].wav"
    assert f"{missing}: No such file" in omni2(*chat(loaded, missing))[0]
    ckpt = tmp_path / "ti[" / "x]ny"
    questions = write_questions(tmp_path / "in.json", [clip("short_d")])
    args = ["--questions", questions, "--out-dir", tmp_path / "out"]
    assert f"{ckpt} is not an omni2-jax checkpoint" in omni2(*chat(ckpt, *args))[0]


def test_an_answer_is_reported_once_it_is_written(omni2, loaded, tmp_path, monkeypatch):
    def fail(path, samples):
        raise ValueError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr(recordings, "save", fail)
    limits = ["--max-new-tokens", 3, "--max-flush-units", 4]
    code, _, err = omni2(*chat(loaded, clip("short_d"), *limits, "--out", tmp_path / "a.wav"))
    assert "no space left on device" in code and "a.wav" not in err


def test_a_failed_answer_names_file_and_item(omni2, loaded, text_model, tmp_path, monkeypatch):
    """What was answered before stays; the first failure leaves nothing."""

    def encode_nan(clips):
        return [jnp.full((300, text_model.config.llm.width), jnp.nan) for _ in clips]

    monkeypatch.setattr(text_model, "encode", encode_nan)
    questions = write_questions(tmp_path / "in.json", [clip("short_d")])
    args = ["--questions", questions, "--out-dir", tmp_path / "out", "--no-wav"]
    refused(omni2(*chat(loaded, *args)), tmp_path, "in.json: item 0 (q0): ", "segment 1 of 1")


def test_too_long_a_conversation_is_refused_before_loading(
    omni2, checkpoint_dir, tmp_path, monkeypatch
):

    def load(*arguments, **settings):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Omni2, "load", load)
    talk = [clip("short_d"), "Yes. " * 5000, clip("short_d")]
    questions = write_questions(tmp_path / "in.json", [clip("short_d")], talk)
    args = ["--questions", questions, "--out-dir", tmp_path / "out"]
    result = omni2(*chat(checkpoint_dir, *args))
    refused(result, tmp_path, "in.json: item 1 (q1): ", "positions, at most 4096 fit")


@pytest.mark.slow
def test_raw_audio_on_stdout(loaded, model, monkeypatch, capfdbinary):
    """Nothing but samples on stdout; the text goes to stderr."""
    command = chat(loaded, SPEECH, *LIMITS, "--stream", "--out", "-")
    monkeypatch.setattr(sys, "argv", ["omni2", *map(str, command)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfdbinary.readouterr()
    answer = model.answer(SPEECH, options=LIMITED)
    assert end.value.code == 0
    assert out == recordings.to_int16(answer.waveform, 32767).astype("<i2").tobytes()
    assert answer.text in err.decode()


@pytest.mark.slow
def test_failure_of_the_process(checkpoint_dir, tmp_path):
    """A damaged parameter file: one line on stderr (four libraries report it), exit code 1."""
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
def test_bad_audio(omni2, checkpoint_dir, tmp_path, message):
    """Told before parameters are read, for a question as for an item of a list.

    The checkpoint has no parameters: reading them would be another error.
    """
    bad = tmp_path / "in.wav"
    BAD_AUDIO[message](bad)
    checkpoint = tmp_path / "ckpt"
    checkpoint.mkdir()
    shutil.copy(checkpoint_dir / "config.json", checkpoint)
    refused(
        omni2(*chat(checkpoint, SPEECH, bad, "--out", tmp_path / "a.wav")),
        tmp_path,
        "in.wav",
        message,
    )
    given = write_questions(tmp_path / "in.json", [SPEECH], [SPEECH, "Yes.", bad])
    refused(
        omni2(*chat(checkpoint, "--questions", given, "--out-dir", tmp_path / "out")),
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


def test_unwritable_output(omni2, checkpoint_dir, tmp_path):
    given = write_questions(tmp_path / "in.json", [SPEECH])
    for args, word in (
        ([SPEECH, "--out", "/proc/x.wav"], "cannot write /proc/x.wav"),
        ([SPEECH, "--stream", "--out", "/proc/x.wav"], "cannot write /proc/x.wav"),
        ([SPEECH, "--out", tmp_path / ("x" * 300 + ".wav")], "File name too long"),
        ([SPEECH, "--out", tmp_path], "is a directory"),
        ([SPEECH, "--out", tmp_path / "no" / "a.wav"], f"{tmp_path / 'no'} is not a directory"),
        (
            [SPEECH, SPEECH, "--stream", "--out", tmp_path / "no" / "a.wav"],
            f"{tmp_path / 'no'} is not a directory",
        ),
        (["--questions", given, "--out-dir", given], "is not a directory"),
        (["--questions", given, "--out-dir", given / "deeper"], "is not a directory"),
    ):
        refused(omni2(*chat(checkpoint_dir, *args)), tmp_path, word)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "answers.jsonl").touch()
    refused(
        omni2(*chat(checkpoint_dir, "--questions", given, "--out-dir", tmp_path / "ckpt")),
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
def test_bad_questions(omni2, checkpoint_dir, tmp_path, content, message):
    given = tmp_path / "in.json"
    given.write_bytes(
        (content if isinstance(content, str) else json.dumps(content)).encode("latin-1")
    )
    refused(
        omni2(*chat(checkpoint_dir, "--questions", given, "--out-dir", tmp_path / "out")),
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
    refused(omni2("chat", "--checkpoint"), tmp_path, "--")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", 0),
        ("--max-new-tokens", 10**9),
        ("--max-flush-units", 10**30),
        ("--seed", 2**63),
        ("--seed", -1),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--unit-temperature", "nan"),
        ("--repetition-penalty", "nan"),
        ("--top-p", "nan"),
        ("--top-k", 10**30),
        ("--chunk", 0),
        ("--chunk", 10**9),
        ("--left-chunks", -2),
        ("--left-chunks", 10**9),
        ("--flow-cache-dtype", "int8"),
    ],
)
def test_options_out_of_range(omni2, tmp_path, option, value):
    """One line that names the option, before the checkpoint is looked at."""
    result = omni2(*chat("nowhere", SPEECH, option, value))
    name = option.removeprefix("--")
    assert name in result[0] or name.replace("-", "_") in result[0]
    refused(result, tmp_path)


def test_engine_options(omni2, loaded, monkeypatch):
    """--flow-cache-dtype and --no-seamless reach the options of the session."""
    options = []

    def session(model, voice, given, **sizes):
        options.append(given)
        raise ValueError("enough")

    monkeypatch.setattr(Omni2, "session", session)
    omni2(*chat(loaded, SPEECH, "--flow-cache-dtype", "bfloat16", "--no-seamless"))
    omni2(*chat(loaded, SPEECH))
    assert [(given.flow_cache_dtype, given.seamless) for given in options] == [
        ("bfloat16", False),
        ("float32", True),
    ]


def test_ctrl_c(omni2, checkpoint_dir, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recordings, "load", interrupted)
    assert omni2(*chat(checkpoint_dir, SPEECH))[0] == 130

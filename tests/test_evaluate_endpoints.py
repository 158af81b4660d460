"""Systems, recognisers and judges behind endpoints, with faults; the stand-in answers in tones."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from omni2_jax.cli.main import main
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.tasks import instructions
from tests.support.commands import is_error_line
from tests.support.endpoints import CHAT, TRANSCRIPTIONS, Standin, serve
from tests.support.evaluations import write_answers, write_items

pytest.importorskip("openai")
ANSWER = "It is blue, and it has four legs."


def reply(messages: Sequence[dict]) -> str:
    """What the stand-in says: the answer to a recording, and a score to a judge's question."""
    content = messages[-1]["content"]
    if isinstance(content, list):
        return ANSWER
    return json.dumps({"score": 5 if "blue" in content else 2})


def judged(standin: Standin) -> int:
    """How many judgements were asked for."""
    return sum("messages" in body and "modalities" not in body for _, body in standin.requests)


@pytest.fixture
def standin():
    with serve(reply=reply, models=None, transcript="Something else.") as standin:
        yield standin


@pytest.fixture
def evaluate(monkeypatch, capsys, standin, tmp_path):
    """Run `omni2 evaluate` on the stand-in -> the exit code or the line of its error."""
    data = write_items(tmp_path / "data")

    def run(*more: object, tasks: Sequence[str], out: str = "out") -> int | str:
        monkeypatch.setattr(
            sys, "argv", ["omni2", *map(str, arguments(*more, tasks=tasks, out=out))]
        )
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as exit:
            main()
        capsys.readouterr()
        code = exit.value.code
        assert code is not None
        return code

    def arguments(*more: object, tasks: Sequence[str], out: str) -> list[object]:
        url = standin.url
        return [
            *("evaluate", "--system", url, "--model", "talker", "--data", data),
            *("--recogniser", url, "--judge", url, "--judge-model", "judge"),
            *(word for task in tasks for word in ("--task", task)),
            *("--out", tmp_path / out, *more),
        ]

    return run


def found(out: Path) -> Results:
    return Results.load(out / "results.json")


def test_everything_behind_endpoints(evaluate, standin, tmp_path):
    """Spoken answers, transcripts and judgements; faults on the way change nothing."""
    standin.faults = {
        CHAT: ["429", "500", "cut", "malformed", "empty"],
        TRANSCRIPTIONS: ["500", "malformed", None, "cut"],
    }
    tasks = ("spoken-qa", "asr-wer", "instructions")
    assert evaluate("--label", "talker", tasks=tasks) == 0
    results = found(tmp_path / "out")
    qa, wer, score = (results.tasks[name].metrics for name in tasks)
    assert (qa["s2t"].value, qa["s2s"].value) == (50, 50)
    assert wer["wer"].value == 0 and score["score_s2s"].value == score["score_s2t"].value == 5
    assert not any(standin.faults.values())
    assert results.system["name"] == "talker" and results.recogniser["model"] == "whisper-1"
    messages = next(body["messages"] for _, body in standin.requests if "modalities" in body)
    assert [message["role"] for message in messages] == ["user"]
    assert messages[0]["content"][0]["input_audio"]["format"] == "wav"


def test_votes_are_paid_for_once(evaluate, standin, tmp_path):
    """Three votes for each text, with seeds of their own; another directory asks for nothing."""
    answers = write_answers(tmp_path / "answers")
    more = ("--system", answers, "--votes", 3, "--judgements", tmp_path / "judgements")
    assert evaluate(*more, tasks=["instructions"]) == 0
    asked = [body for _, body in standin.requests if "messages" in body]
    assert len(asked) == 4 * 2 * 3 == judged(standin)
    assert {body["seed"] for body in asked} == {0, 1, 2}
    assert all(body["response_format"] == {"type": "json_object"} for body in asked)
    # "blue" is in the text of one answer, and in no transcript.
    metrics = found(tmp_path / "out").tasks["instructions"].metrics
    assert metrics["score_s2t"].value == pytest.approx((5 + 2 * 3) / 4)
    assert metrics["score_s2s"].value == 2
    assert evaluate(*more, tasks=["instructions"], out="again") == 0
    assert judged(standin) == len(asked)


def test_an_interrupted_judgement_goes_on(evaluate, standin, tmp_path):
    """A judge that fails for good ends the run in one line; no vote is asked for twice."""
    answers = write_answers(tmp_path / "answers")
    standin.faults = {CHAT: [None] * 5}
    standin.always = {CHAT: "404"}
    more = ("--system", answers, "--votes", 2)
    code = evaluate(*more, tasks=["instructions"])
    assert is_error_line(code) and "404" in code
    standin.always = {}
    before = judged(standin)
    assert evaluate(*more, tasks=["instructions"]) == 0
    assert judged(standin) - before == 4 * 2 * 2 - 5


def test_a_judge_that_rambles(evaluate, standin, tmp_path):
    """Asked again for what cannot be read; an answer without any score is left out and counted."""
    standin.reply = lambda messages: "Quite good." if "sea" in str(messages) else '{"score": 3}'
    answers = write_answers(tmp_path / "answers")
    assert evaluate("--system", answers, tasks=["instructions"]) == 0
    task = found(tmp_path / "out").tasks["instructions"]
    assert task.answers == 3 and task.left_out == {"not scored": 1}
    assert task.metrics["score_s2t"].value == 3 and task.metrics["score_s2t"].count == 3
    assert judged(standin) == instructions.TRIES + 3 * 2


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"score": 4}', 4),
        ('{"score": "4", "why": "x"}', 4),
        ('{"score": 4.5}', None),
        ('{"score": 6}', None),
        ('{"score": null}', None),
        ("[4]", None),
        ("4", None),
        ("four", None),
    ],
)
def test_what_a_judge_says(said, score):
    assert instructions.parsed(said) == score


def test_latency_of_an_endpoint(evaluate, standin, tmp_path):
    """Streamed, one question after the other."""
    assert evaluate(tasks=["latency"]) == 0
    metrics = found(tmp_path / "out").tasks["latency"].metrics
    assert 0 < metrics["first_audio"].value <= metrics["total"].value
    assert metrics["real_time_factor"].value > 0 and "hearing" not in metrics
    assert all(body["stream"] for _, body in standin.requests)


def test_answers_that_fail(evaluate, standin, tmp_path):
    """An item that gets no usable answer counts as wrong; the others are measured."""
    standin.reply = lambda messages: ANSWER
    standin.faults = {CHAT: ["empty"] * 3}
    assert evaluate("--batch", 1, tasks=["spoken-qa"]) == 0
    results = found(tmp_path / "out")
    assert results.notes == ["1 of 4 have no answer"]
    assert results.tasks["spoken-qa"].left_out == {"no answer": 1}
    assert results.tasks["spoken-qa"].metrics["s2t"].value == 25
    assert results.tasks["spoken-qa"].metrics["s2t"].count == 4


def test_refusals(evaluate, standin, tmp_path):
    """One line each, before anything is answered."""
    gone = "http://127.0.0.1:9/v1"
    standin.models = ("talker", "judge", "whisper-1")
    for more, words in (
        (["--model", ""], "needs the name of a model: give --model"),
        (["--model", "singer"], "has no model 'singer'; it has judge, talker, whisper-1"),
        (["--judge-model", "nobody"], "has no model 'nobody'"),
        (["--recogniser-model", "deaf"], "has no model 'deaf'"),
        (["--judge", ""], "the task instructions needs a judge: give --judge"),
        (["--system", gone], f"{gone} cannot be reached"),
        (["--key-variable", "NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY holds no key"),
        (["--read", "1", "--write", "5"], "is no checkpoint, which --read and --write need"),
    ):
        code = evaluate(*more, tasks=["instructions"])
        assert is_error_line(code) and words in code
    standin.always = {TRANSCRIPTIONS: "empty"}
    code = evaluate(tasks=["asr-wer"])
    assert is_error_line(code) and "hears nothing in the first 3 questions" in code
    assert standin.count(CHAT) == 0 and not (tmp_path / "out").exists()

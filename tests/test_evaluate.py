"""`omni2 evaluate` on a folder of answers: items, tasks, an interrupted run, and refusals."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.evaluate import items as item_files
from omni2_jax.evaluate import measure
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.systems.folder import AnswersFolder
from omni2_jax.evaluate.tasks import TaskOptions, spoken_qa
from omni2_jax.evaluate.tasks.text_qa import TextQA
from tests.support import evaluations
from tests.support.commands import is_error_line
from tests.support.evaluations import ScriptedRecogniser, write_answers, write_items, write_lines


@pytest.fixture
def recogniser(monkeypatch):
    """Replace the recogniser that the command opens."""

    def use(one: object) -> None:
        monkeypatch.setattr(measure, "open_recogniser", lambda source, options: one)

    use(ScriptedRecogniser())
    return use


@pytest.fixture
def given(tmp_path):
    """The arguments of an evaluation of four answers: (*more)."""
    data, answers = write_items(tmp_path / "data"), write_answers(tmp_path / "answers")

    def arguments(*more: object, tasks: tuple[str, ...] = ("spoken-qa", "asr-wer")) -> list[object]:
        chosen = [word for task in tasks for word in ("--task", task)]
        out = ["--recogniser", "scripted", "--out", tmp_path / "out"]
        return ["evaluate", *chosen, "--system", answers, "--data", data, *out, *more]

    return arguments


# --- items


def test_formats_of_items(tmp_path):
    """Our keys, VoiceBench's and UltraEval-Audio's, released questions, dialogues with turns."""
    sound = evaluations.SPOKEN / "sea-1-q.wav"
    rows = [
        {"id": "ours", "audio": str(sound), "question": "Q?", "answers": ["a", "b"], "topic": "t"},
        {"prompt": "Q?", "audio": {"path": str(sound)}, "reference": "a", "split": "usa"},
        {"WavPath": str(sound), "QuestionText": "Q?", "answer": 7, "metadata": {"voice": "v"}},
        {
            "id": "talk",
            "turns": [
                {"role": "user", "text": "Q?", "audio": str(sound)},
                {"role": "assistant", "text": "A."},
                {"role": "user", "text": "And?", "audio": str(sound)},
                {"role": "assistant", "text": "B.", "answers": ["b"]},
            ],
        },
    ]
    found = item_files.read_items(write_lines(tmp_path / "items.jsonl", rows))
    assert [item.name for item in found] == ["ours", "000001", "000002", "talk"]
    assert [item.references for item in found] == [("a", "b"), ("a",), ("7",), ("b",)]
    assert [dict(item.metadata) for item in found] == [
        {"topic": "t"},
        {"split": "usa"},
        {"voice": "v"},
        {"questions": "2"},
    ]
    assert found[3].turns == (sound, "A.", sound)
    assert (found[3].question, found[3].reply) == ("And?", "B.")
    released = item_files.read_items(evaluations.EXAMPLES / "questions.json")
    assert [len(item.turns) for item in released] == [1, 3]
    assert len(item_files.read_items(tmp_path / "items.jsonl", limit=2)) == 2


def test_every_turn(tmp_path):
    """Each question of a conversation is an item, with its own answers; limits count the rows."""
    sound = str(evaluations.SPOKEN / "sea-1-q.wav")
    turns = [
        {"role": "user", "text": "Q?", "audio": sound, "answers": ["a"]},
        {"role": "assistant", "text": "A."},
        {"role": "user", "text": "And?", "audio": sound, "answers": ["b"]},
        {"role": "assistant", "text": "B."},
    ]
    rows = [{"id": "talk", "split": "test", "turns": turns}, {"id": "one", "audio": sound}]
    path = write_lines(tmp_path / "items.jsonl", [*rows, {"id": "two", "audio": sound}])
    first, second, single = item_files.read_items(path, limit=2, every_turn=True)
    assert [first.name, second.name, single.name] == ["talk-0", "talk-1", "one"]
    assert (first.question, first.reply, first.references) == ("Q?", "A.", ("a",))
    assert (second.question, second.reply, second.references) == ("And?", "B.", ("b",))
    assert (first.turns, second.turns[1:]) == (second.turns[:1], ("A.", second.turns[0]))
    assert {item.conversation for item in (first, second)} == {"talk"} and first.asked == 2
    assert [item.metadata["questions"] for item in (first, second)] == ["1", "2"]
    assert (single.conversation, single.asked) == ("one", 1)
    chosen = item_files.read_items(path, split="test", every_turn=True)
    assert [item.name for item in chosen] == ["talk-0", "talk-1"]
    with pytest.raises(ValueError, match="has no item of split 'dev'"):
        item_files.read_items(path, split="dev")


def test_whole_conversations(tmp_path):
    """All answers of a conversation are right; one that is not scored whole does not count."""

    def row(conversation, right, asked=2):
        return {"s2t": right, "exact": None, "conversation": conversation, "asked": asked}

    rows = [row("a", True), row("a", True), row("b", True), row("b", False), row("c", True)]
    silent, other = evaluations.items(tmp_path)[:2]
    task = TextQA(TaskOptions())
    found = task.summarise([*rows, row("d", True, asked=1)], unanswered=[silent])
    assert (found["whole"].value, found["whole"].count) == (50, 2)
    assert "exact" not in found  # no item states a whole reply
    assert round(found["s2t"].value, 1) == 71.4  # 5 of 6 that are scored, and one without an answer
    assert "whole" not in task.summarise([row("c", True)], unanswered=[])
    # Without an answer, only those that state a whole reply are wrong replies.
    rows = [row("a", True, asked=1) | {"exact": True}]
    silent = [dataclasses.replace(silent, reply="Blue."), other]
    found = task.summarise(rows, unanswered=silent)
    assert (found["exact"].value, found["exact"].count) == (50, 2) and found["s2t"].count == 3


def test_recordings_in_parquet(tmp_path):
    """As data sets on Hugging Face hold them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = (evaluations.SPOKEN / "sea-1-q.wav").read_bytes()
    rows = [{"audio": {"bytes": content, "path": "a.wav"}, "prompt": "Q?", "reference": "blue"}]
    (tmp_path / "data").mkdir()
    for number in range(2):
        file = tmp_path / "data" / f"test-{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = item_files.read_items(tmp_path / "data", folder=tmp_path / "sounds")
    assert [item.references for item in found] == [("blue",)] * 2
    found[0].turns[0].write_bytes(bytes(len(content)))  # of another file of items
    found = item_files.read_items(tmp_path / "data", folder=tmp_path / "sounds")
    assert [item.turns[0].read_bytes() for item in found] == [content] * 2


SOUND = {"audio": str(evaluations.SPOKEN / "sea-1-q.wav")}
BAD_ITEMS = {
    "nothing": ([], "holds no items"),
    "no object": ([1], "item 0 is 1, expected an object"),
    "no recording": ([{"question": "Q?"}], "item 0 (000000) has no recording"),
    "not there": ([{"audio": "a.wav"}] * 3, "a.wav (and 2 more recordings are missing)"),
    "id": ([{**SOUND, "id": "a/b"}], "item 0: id 'a/b' cannot be a file's name"),
    "twice": ([{**SOUND, "id": "a"}] * 2, "item 1 (a): id 'a' is used twice"),
    "answers": ([{**SOUND, "answers": {"a": 1}}], "its answers are {'a': 1}, expected texts"),
    "turns": ([{**SOUND, "turns": "a"}], "its turns are no list of objects"),
    "no turn": ([{**SOUND, "turns": []}], "has no turn"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(tmp_path, name):
    rows, words = BAD_ITEMS[name]
    path = write_lines(tmp_path / "items.jsonl", rows)
    with pytest.raises(ValueError) as error:
        item_files.read_items(path)
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line and words in line


# --- rules


@pytest.mark.parametrize(
    ("references", "answer", "words", "anywhere"),
    [
        (["Paris"], "It is paris, of course.", True, True),
        (["twenty-one"], "That makes 21.", True, False),
        (["21"], "That makes twenty one.", True, False),
        (["art"], "What a party!", False, True),
        (["New York"], "New ideas from York", False, False),
        (["London", "Paris"], "Paris!", True, True),
        (["colour"], "the color red", True, False),
        (["!"], "Paris!", False, True),
        (["a"], "", False, False),
    ],
)
def test_right_answers(references, answer, words, anywhere):
    assert spoken_qa.occurs(references, answer) == words
    assert spoken_qa.exists(references, answer) == anywhere


# --- runs


def test_a_run(omni2, given, recogniser, tmp_path):
    """Numbers that follow from what is heard, by topic, with everything to repeat them."""
    code, out, _ = omni2(*given("--label", "examples"))
    assert code == 0 and "examples on items" in out and "asr-wer" in out
    results = Results.load(tmp_path / "out" / "results.json")
    metrics = results.tasks["spoken-qa"].metrics
    assert metrics["s2t"].value == 100 and metrics["s2t"].count == 4
    assert metrics["s2s"].value == 50 and metrics["s2s"].low < 50 < metrics["s2s"].high
    by_topic = results.tasks["spoken-qa"].groups["topic"]
    assert by_topic["nature"]["s2s"].value == 100 and by_topic["kitchen"]["s2s"].value == 0
    # "can not have", 2 errors of 4 words; "or" for "and"; nothing of 4 words.
    assert results.tasks["asr-wer"].metrics["wer"].value == pytest.approx(100 * 7 / 16)
    assert results.recogniser == {"kind": "scripted"} and results.system["kind"] == "folder"
    assert results.command[:2] == ["omni2", "evaluate"] and results.data["items"] == 4
    assert "jiwer" in results.environment["versions"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").open()]
    assert lines[1]["transcript"] == "Can't have four legs!"
    assert (tmp_path / "out" / lines[1]["wav"]).exists()


def test_an_interrupted_run_goes_on(omni2, given, recogniser, tmp_path):
    """Nothing is heard twice, and the results are those of a run that was not interrupted."""
    heard = []

    def stop_after_three():
        if len(heard) == 3:
            raise RuntimeError("the power fails")
        heard.append(1)

    recogniser(ScriptedRecogniser(before=stop_after_three))
    code, _, _ = omni2(*given())
    assert code == "error: the power fails"
    assert not (tmp_path / "out" / "results.json").exists()
    recogniser(ScriptedRecogniser(before=lambda: heard.append(1)))
    assert omni2(*given())[0] == 0
    assert len(heard) == 1 + 4 + 1  # the trial with a question, in both runs
    first = (tmp_path / "out" / "results.json").read_bytes()
    recogniser(ScriptedRecogniser(before=lambda: heard.append(1)))
    assert omni2(*given())[0] == 0 and len(heard) == 7
    assert (tmp_path / "out" / "results.json").read_bytes() == first


def test_a_task_is_added(omni2, given, recogniser, tmp_path):
    """To the same answers: the earlier task stays, and nothing is answered again."""
    assert omni2(*given(tasks=("spoken-qa",)))[0] == 0
    assert omni2(*given(tasks=("asr-wer",)))[0] == 0
    results = Results.load(tmp_path / "out" / "results.json")
    assert list(results.tasks) == ["spoken-qa", "asr-wer"]
    assert omni2(*given("--recogniser", "", tasks=("text-qa",)))[0] == 0
    results = Results.load(tmp_path / "out" / "results.json")
    assert len(results.tasks) == 3 and results.recogniser == {"kind": "scripted"}


def test_other_settings_are_refused(omni2, given, recogniser, tmp_path):
    assert omni2(*given())[0] == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    write_lines(
        tmp_path / "answers" / "answers.jsonl",
        [{"question_id": name, "prediction": "No."} for name in evaluations.REFERENCES],
    )
    code, _, _ = omni2(*given())
    assert is_error_line(code) and "answers" in code
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_other_recordings_are_refused(omni2, given, recogniser, tmp_path):
    """Their scores would come from the recordings that were there before."""
    assert omni2(*given())[0] == 0
    assert omni2(*given())[0] == 0
    wav = tmp_path / "answers" / "sea.wav"
    wav.write_bytes(wav.with_name("cats.wav").read_bytes())
    code, _, _ = omni2(*given("--label", "again"))
    assert is_error_line(code) and "was begun with " in code and "recordings_sha256" in code


def test_a_recogniser_that_hears_nothing(omni2, given, recogniser, tmp_path):
    """In questions: refused at once. In answers alone: it is said, and the numbers are given."""

    class Deaf(ScriptedRecogniser):
        def transcribe(self, samples, rate):
            return ""

    recogniser(Deaf())
    code, _, _ = omni2(*given())
    assert is_error_line(code) and "hears nothing in the first 3 questions" in code
    assert not (tmp_path / "out").exists()
    recogniser(ScriptedRecogniser(dict.fromkeys(evaluations.REFERENCES, "")))
    code, _, err = omni2(*given())
    assert code == 0 and "the recogniser heard nothing in any of the 4 answers" in err
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.tasks["asr-wer"].metrics["wer"].value == 100 and results.notes


def test_answers_without_speech(omni2, given, recogniser, tmp_path):
    """They are wrong as speech, and all their words are errors."""
    (tmp_path / "answers" / "cats.wav").unlink()
    code, _, err = omni2(*given())
    assert code == 0 and "1 of 4 answers have no speech" in err
    metrics = Results.load(tmp_path / "out" / "results.json").tasks["spoken-qa"].metrics
    assert (metrics["s2t"].value, metrics["s2s"].value) == (100, 25)


REFUSED = {
    "no task": (["--task", "singing"], "there is no task singing; expected one of spoken-qa"),
    "no recogniser": (["--recogniser", ""], "the task spoken-qa needs a recogniser"),
    "latency": (["--task", "latency"], "latency needs a checkpoint or"),
    "row": (["--row", "table2/none"], "--row table2/none is no row of the paper"),
    "grid": (["--read", "1,2"], "--read and --write go together"),
    "grid of a folder": (["--read", "1", "--write", "5"], "is no checkpoint, which --read"),
    "utmos": (["--task", "naturalness", "--utmos", "none.pt"], "no UTMOS weights at none.pt"),
    "option": (["--option", "loudness=3"], "--option 'loudness=3': expected NAME=VALUE"),
    "value": (["--option", "max_new_tokens=0"], "max_new_tokens"),
    "system": (["--system", "nowhere"], "nowhere is no system: expected a checkpoint"),
    "data": (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(omni2, given, recogniser, tmp_path, name):
    """One line, and nothing is written."""
    more, words = REFUSED[name]
    code, _, _ = omni2(*given(*more))
    assert is_error_line(code) and words in code
    assert not (tmp_path / "out").exists()


def test_items_without_answers(omni2, given, recogniser, tmp_path):
    data = write_lines(tmp_path / "data" / "none.jsonl", [{**SOUND, "id": "sea"}])
    code, _, _ = omni2(*given("--data", data))
    assert is_error_line(code) and "item 0 (sea) has no answers, which the task needs" in code


# --- folders of answers


def layouts(folder: Path) -> dict[str, dict[str, object]]:
    """What other software writes: lines, and the place of the wav of answer number N."""
    replies = {name: reply["text"] for name, (_, reply) in evaluations.first_turns().items()}
    return {
        "LLaMA-Omni": {
            "file": "answer.json",
            "rows": [
                {"question_id": n, "prediction": t, "answer": None} for n, t in replies.items()
            ],
            "wav": "answer_wav/{number}_pred.wav",
        },
        "VoiceBench": {
            "file": "glm-sd-qa-usa-audio.jsonl",
            "rows": [{"prompt": "Q?", "response": text} for text in replies.values()],
        },
        "UltraEval-Audio": {
            "file": "glm.jsonl",
            "rows": [
                row
                for number, text in enumerate(replies.values())
                for row in (
                    {"type": "prompt", "id": number, "data": {"content": "Q?"}},
                    {
                        "type": "inference",
                        "id": number,
                        "data": {"content": json.dumps({"text": text, "audio": f"{number}.wav"})},
                    },
                )
            ],
            "wav": "{number}.wav",
        },
    }


@pytest.mark.parametrize("name", ["LLaMA-Omni", "VoiceBench", "UltraEval-Audio"])
def test_layouts_of_answers(tmp_path, name):
    layout = layouts(tmp_path)[name]
    write_lines(tmp_path / layout["file"], layout["rows"])
    turns = evaluations.first_turns()
    for number, (_, reply) in enumerate(turns.values()):
        if "wav" in layout:
            target = tmp_path / layout["wav"].format(number=number)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((evaluations.SPOKEN / reply["audio"]).read_bytes())
    questions = evaluations.items(tmp_path / "data")
    system = AnswersFolder(tmp_path)
    system.check(questions)
    answer = system.open()
    for item in questions:
        given = answer(item)
        assert given.text == turns[item.name][1]["text"]
        if "wav" not in layout:
            assert given.samples is None
            continue
        path = evaluations.SPOKEN / turns[item.name][1]["audio"]
        assert given.samples is not None
        np.testing.assert_array_equal(given.samples, recordings.load(path, given.rate))


def test_folders_that_cannot_be_used(tmp_path):
    questions = evaluations.items(tmp_path / "data")
    with pytest.raises(ValueError, match=r"needs one \.jsonl file; it has none"):
        AnswersFolder(tmp_path)
    rows = [{"question_id": "sea", "prediction": "Blue."}]
    write_lines(tmp_path / "answers.jsonl", rows)
    with pytest.raises(ValueError, match="no answer to 3 of 4 items, the first of which is cats"):
        AnswersFolder(tmp_path).check(questions)
    (tmp_path / "answers.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 0 is no JSON object"):
        AnswersFolder(tmp_path)


# --- real parts


@pytest.mark.slow
def test_naturalness(omni2, given, tmp_path):
    """DNSMOS tells speech from speech in loud noise; UTMOS is read from TorchScript."""
    torch = pytest.importorskip("torch")

    class Loudness(torch.nn.Module):
        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            return samples.abs().amax(dim=1) + samples.shape[0]

    torch.jit.script(Loudness()).save(tmp_path / "utmos.pt")
    more, random = ["--utmos", tmp_path / "utmos.pt"], np.random.default_rng(0)
    for name in ("sea", "cats"):
        path = tmp_path / "answers" / f"{name}.wav"
        noisy = recordings.load(path, 24000)
        noisy = np.clip(noisy + random.normal(0, 0.2, noisy.size), -1, 1)
        recordings.save(path, noisy)
    assert omni2(*given(*more, tasks=("naturalness",)))[0] == 0
    found = Results.load(tmp_path / "out" / "results.json").tasks["naturalness"]
    clean, noisy = found.groups["topic"]["kitchen"], found.groups["topic"]["nature"]
    for name in ("dnsmos_ovrl", "dnsmos_bak", "dnsmos_p808"):
        assert 1 <= noisy[name].value + 0.3 < clean[name].value <= 5
    samples = recordings.load(tmp_path / "answers" / "tea.wav", 16000)
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").open()]
    expected = pytest.approx(1 + np.abs(samples).max(), abs=1e-4)
    assert lines[3]["scores"]["naturalness"]["utmos"] == expected


@pytest.mark.skipif("OMNI2_WHISPER" not in os.environ, reason="OMNI2_WHISPER names no model")
def test_whisper_hears_the_answers(omni2, given, tmp_path):
    assert omni2(*given("--recogniser", os.environ["OMNI2_WHISPER"]))[0] == 0
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.tasks["spoken-qa"].metrics["s2t"].value == 100
    assert 0 < results.tasks["asr-wer"].metrics["wer"].value < 80  # espeak-ng, and a tiny Whisper
    assert results.recogniser and results.recogniser["kind"] == "faster-whisper"

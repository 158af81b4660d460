"""A checkpoint as the system: its answers in batches, with a clock, and over a grid of R and W."""

import dataclasses
import json

import numpy as np
import pytest

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.evaluate import measure, run
from omni2_jax.evaluate.items import read_items
from omni2_jax.evaluate.results import Results
from omni2_jax.evaluate.systems import SystemOptions, open_system
from omni2_jax.evaluate.tasks import TaskOptions
from omni2_jax.evaluate.tasks.copy_synthesis import CopySynthesis
from omni2_jax.generate.omni2 import Omni2, join
from tests.support.conversations import GREEDY, clip, three_slots
from tests.support.evaluations import ScriptedRecogniser, write_lines

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=12, max_flush_units=15)


@pytest.fixture
def data(tmp_path):
    """Three questions, one of them after an earlier turn."""
    rows = [{"id": name, "audio": str(clip(name))} for name in ("speech_a", "speech_b")]
    turns = [{"audio": str(clip("short_d"))}, {"text": "Yes."}, {"audio": str(clip("synth_c"))}]
    return write_lines(tmp_path / "items.jsonl", [*rows, {"id": "talk", "turns": turns}])


@pytest.fixture
def loaded(monkeypatch, model):
    """The checkpoint is in memory already; what it was loaded with is noted."""
    calls: list[dict] = []
    monkeypatch.setattr(
        Omni2, "load", lambda directory, **settings: calls.append(settings) or model
    )
    with three_slots(model):
        yield calls


@pytest.mark.slow
def test_batched_answers(loaded, checkpoint_dir, model, warm_engine, data, tmp_path):
    """Three at once: text and speech of each are those of `Omni2.streams`."""
    options = SystemOptions(batch=3, options=OPTIONS)
    settings = measure.Settings(
        ("asr-wer",), str(checkpoint_dir), data, tmp_path / "out", options, recogniser="scripted"
    )
    compiled = warm_engine.compilations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "open_recogniser", lambda *_: ScriptedRecogniser())
        (results,) = measure.measure(settings)
    assert warm_engine.compilations() == compiled
    items = read_items(data)
    streams = model.streams([item.turns for item in items], options=OPTIONS, slots=3)
    for item, replies in zip(items, streams, strict=True):
        answer = join(replies, spoken=True)
        samples, rate = run.load_wav(tmp_path / "out" / "answers", f"wav/{item.name}.wav")
        assert rate == recordings.OUTPUT_RATE and answer.waveform is not None
        np.testing.assert_allclose(samples, np.clip(answer.waveform, -1, 1), atol=1e-4)
    assert results.system["read"] == model.config.read and len(results.system["checksum"]) == 64
    assert Results.load(tmp_path / "out" / "results.json") == results


@pytest.mark.slow
def test_answers_in_text_alone(loaded, checkpoint_dir, model, data, tmp_path):
    """No speech LM or decoder is loaded; text-qa judges the text, also by two keys at once."""
    items = read_items(data)
    streams = model.streams([item.turns for item in items], options=OPTIONS, slots=3)
    texts = [join(replies, spoken=True).text.strip() for replies in streams]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row, text, split in zip(rows, [texts[0], "wrong", texts[2]], "aab", strict=True):
        row |= {"answers": [text], "split": split, "voices": "new"}
    rows[2]["turns"].append({"text": texts[2] + " More."})
    data = write_lines(tmp_path / "answers.jsonl", rows)
    options = SystemOptions(batch=3, options=OPTIONS, speech=False)
    settings = measure.Settings(
        ("text-qa",), str(checkpoint_dir), data, tmp_path / "out", options, by=("split+voices",)
    )
    (results,) = measure.measure(settings)
    found = results.tasks["text-qa"]
    assert (loaded[0]["decoder"], loaded[0]["speech"]) == (False, False)
    assert round(found.metrics["s2t"].value, 1) == 66.7
    assert (found.metrics["exact"].value, found.metrics["exact"].count) == (0, 1)
    by_pair = found.groups["split+voices"]
    assert {name: group["s2t"].value for name, group in by_pair.items()} == {
        "a, new": 50,
        "b, new": 100,
    }
    assert not (tmp_path / "out" / "answers" / "wav").exists()
    with pytest.raises(ValueError, match="the task asr-wer measures speech"):
        list(measure.measure(dataclasses.replace(settings, tasks=("asr-wer",))))
    with pytest.raises(ValueError, match=r"no item states 'age', of 'split\+age'"):
        list(measure.measure(dataclasses.replace(settings, by=("split+age",))))


@pytest.mark.slow
def test_timed_answers(loaded, checkpoint_dir, data, model):
    """One at a time; stages are known for single turns. All have the buffers of the longest."""
    items, sizes, engine = read_items(data), set(), model.engine

    def sized(options, positions, slots=1):
        sizes.add((positions, slots))
        return engine(options, positions, slots)

    system = open_system(str(checkpoint_dir), SystemOptions(timed=True, options=OPTIONS))
    assert system.workers == 1
    system.check(items)
    answer = system.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "engine", sized)
        for item in items:
            seconds = answer(item).seconds
            assert 0 < seconds["first_step"] <= seconds["first_audio"] <= seconds["total"]
            assert ("hearing" in seconds) == ("prefill" in seconds) == (len(item.turns) == 1)
    assert sizes == {(system.positions, 1)}
    whole = {"decoder": True, "speech": True}
    assert loaded == [{"mesh": None, "read": None, "write": None, **whole}]


def test_a_grid_of_the_read_write_rule(loaded, checkpoint_dir, data, tmp_path, monkeypatch):
    """Every pair is measured in a directory of its own, as a row of table 4."""
    monkeypatch.setattr(measure, "open_recogniser", lambda *_: ScriptedRecogniser())
    options = SystemOptions(batch=3, options=OPTIONS)
    settings = measure.Settings(
        ("asr-wer",), str(checkpoint_dir), data, tmp_path, options, recogniser="scripted", limit=1
    )
    found = list(measure.measure(settings, [(1, 5), (3, 10)]))
    assert [results.label for results in found] == ["ckpt R1 W5", "ckpt R3 W10"]
    assert [results.rows for results in found] == [["table4/1-5"], ["table4/3-10"]]
    assert [results.system["read"] for results in found] == [1, 3]
    assert [(call["read"], call["write"]) for call in loaded] == [(1, 5), (3, 10)]
    assert (tmp_path / "read1-write5" / "results.json").exists()


@pytest.mark.slow
def test_another_read_write_rule(checkpoint_dir):
    """R = 2, W = 5: a step gives two text tokens and five units at the most, and no fewer before
    the text's end."""
    model = Omni2.load(checkpoint_dir, decoder=False, read=2, write=5)
    stream = model.engine(OPTIONS, 400)
    assert (stream.config.read, stream.config.write) == (2, 5)
    units = [len(reply.units) for reply in model.stream(clip("speech_a"), options=OPTIONS)]
    assert max(units) <= 5 and len(units) >= OPTIONS.max_new_tokens // 2


def test_a_voice_of_a_file(checkpoint_dir, tmp_path):
    """Its content belongs to the description, that of a stored voice to the checkpoint's."""
    voice = tmp_path / "voice.npy"
    task = TaskOptions(checkpoint=checkpoint_dir, copies=tmp_path, voice=str(voice))
    found = []
    for content in (b"a", b"b"):
        voice.write_bytes(content)
        system = open_system(str(checkpoint_dir), SystemOptions(voice=str(voice)))
        found += [system.describe(), CopySynthesis(task).describe()]
    assert len({one["voice_sha256"] for one in found}) == 2
    assert {one["voice"] for one in found} == {str(voice)}
    stored = open_system(str(checkpoint_dir), SystemOptions(voice="espeak"))
    assert "voice_sha256" not in stored.describe()


def test_what_is_refused(loaded, checkpoint_dir, model, data, tmp_path, monkeypatch):
    """Bad audio and long conversations before the model is loaded; of a failed answer, the item."""
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    system = open_system(str(checkpoint_dir), SystemOptions(options=GREEDY))
    for turns, words in (
        ([{"audio": str(bad)}], "bad.wav is cut short"),
        (
            [
                {"audio": str(clip("short_d"))},
                {"text": "Yes. " * 5000},
                {"audio": str(clip("short_d"))},
            ],
            "at most 4096 fit",
        ),
    ):
        items = read_items(write_lines(tmp_path / "bad.jsonl", [{"turns": turns}]))
        with pytest.raises(ValueError, match=words) as error:
            system.check(items)
        assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}: item 0")
    assert not loaded
    items = read_items(data)
    nobody = open_system(str(checkpoint_dir), SystemOptions(voice="nobody"))
    with pytest.raises(ValueError, match="voice 'nobody' is neither a file nor a voice"):
        nobody.check(items)
    system.check(items)

    def failing(error: Exception):
        def fail(*_, **__):
            raise error

        return fail

    answer = system.open()
    monkeypatch.setattr(model, "streams", failing(ValueError("nothing is heard")))
    with pytest.raises(jobs.Refused, match="nothing is heard"):
        answer(items[0])
    monkeypatch.setattr(model, "streams", failing(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):  # no item's fault
        answer(items[0])

"""`omni2 prepare`: the formats of sources, and damaged dialogues."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from omni2_jax.audio import recordings
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.sources import SourceError, json_files
from tests.support.paths import ROOT
from tests.support.preparing import SPOKEN, lines, prepared, run

# ---- sources ----

TURNS = [
    ("One?", "q.wav", None),
    (" Two. ", "a.wav", [1, 6560]),
    ("Three?", "q.wav", None),
    ("Vier ü!", "a.wav", [7]),
]


def questions(folder, place, key, spelled):
    """A JSON array; the second dialogue has no id."""
    turns = [
        {
            "from": ("human", "gpt")[i % 2],
            "speech": place.format(wav),
            "text": text,
            key: spelled(made),
        }
        for i, (text, wav, made) in enumerate(TURNS)
    ]
    (folder / "some.json").write_text(
        json.dumps([{"id": 5, "conversation": turns}, {"conversation": turns[:2]}], indent=2)
    )
    return folder / "some.json"


def jsonl(folder, place, _, spelled):
    turns = [(text, place.format(wav), spelled(made)) for text, wav, made in TURNS]
    (folder / "data.jsonl").write_text(
        lines(turns, turns[:2])
        .replace('"d0"', "5")
        .replace('"id": "d1", ', "")
        .replace("\n", "\n\n")
    )
    return folder


def numbers(made):
    return made


def spaced(made):
    return made and " ".join(map(str, made))


def tagged(made):
    return "".join(f"<{unit}>" for unit in made or [])


SOURCES = {
    "questions": ("questions", questions, "", "{}", "units", numbers),
    "questions, units as text": ("questions", questions, "wavs", "wavs/{}", "units", spaced),
    "jsonl": ("jsonl", jsonl, "", "{}", "units", tagged),
    "instructs2s": (
        "instructs2s",
        questions,
        "en/wav/7",
        "/their/disk/en/wav/7/{}",
        "unit",
        tagged,
    ),
    "instructs2s, relative": ("instructs2s", questions, "en/wav/7", "wav/7/{}", "unit", numbers),
}


@pytest.mark.parametrize("kind, write, folder, place, key, spelled", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "inferred"])
def test_sources_give_the_same(kind, write, folder, place, key, spelled, stated, tmp_path):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, size, rate in (("q.wav", 1600, 16000), ("a.wav", 2400, 24000)):
        recordings.save(tmp_path / folder / name, np.linspace(-1, 1, size), rate)
    data = prepared(
        write(tmp_path, place, key, spelled),
        tmp_path / "out",
        *(["--format", kind] if stated else []),
    )
    assert len(data) == 2
    for index, count in enumerate((4, 2)):
        dialogue = data.dialogue(index)
        assert dialogue.id == ("5", "1")[index]
        assert [turn.text for turn in dialogue.turns] == ["One?", "Two.", "Three?", "Vier ü!"][
            :count
        ]
        assert [turn.role for turn in dialogue.turns] == ["user", "assistant"] * (count // 2)
        assert [turn.samples for turn in dialogue.turns] == [1600, 2400] * (count // 2)
        assert [turn.units.tolist() for turn in dialogue.turns[1::2]] == [[1, 6560], [7]][
            : count // 2
        ]


def test_a_json_array_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    items = [{"a": '][}{,\\" ü' * i, "b": [i, None, {"c": i}]} for i in range(30)] + [
        None,
        [],
        7,
        "x",
    ]
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(
            "\ufeff " + json.dumps(items, indent=indent, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        for chunk in (1, 7, 1000, 10**6):
            monkeypatch.setattr(json_files, "BLOCK", chunk)
            read = list(json_files.json_array(tmp_path / "x.json"))
            assert [item for item, _ in read[:-2]] == items[:-2]
            done = [share for _, share in read]
            assert done == sorted(done) and done[-1] == 1
    (tmp_path / "x.json").write_text(" [ ] ")
    assert list(json_files.json_array(tmp_path / "x.json")) == []


# ---- what cannot be used ----


def turns_but(index, **changes):
    """A good dialogue's turns with one of them changed."""
    turns = [
        {"role": "user", "text": "q", "audio": "q.wav"},
        {"role": "assistant", "text": "a", "audio": "q.wav", "units": [1]},
    ]
    turns[index] |= changes
    return turns


DAMAGED = {
    "audio missing": (
        {"turns": turns_but(0, audio="gone.wav")},
        "turn 0: {}/gone.wav does not exist",
    ),
    "audio a folder": ({"turns": turns_but(0, audio=".")}, "turn 0: {}: Is a directory"),
    "audio unreadable": (
        {"turns": turns_but(1, audio="data.jsonl")},
        "turn 1: {}/data.jsonl is not audio that can be read",
    ),
    "audio too short": (
        {"turns": turns_but(0, audio="short.wav")},
        "turn 0: {}/short.wav has 159 samples at 16000 Hz, less than 10 ms",
    ),
    "no audio": ({"turns": turns_but(0, audio=7)}, "turn 0: 'audio' is 7, expected a path"),
    "unit out of range": (
        {"turns": turns_but(1, units=[0, 6561])},
        "turn 1 has the unit 6561, expected 0 to 6560",
    ),
    "unit below": (
        {"turns": turns_but(1, units=[-1])},
        "turn 1 has the unit -1, expected 0 to 6560",
    ),
    "unit in a text out of range": (
        {"turns": turns_but(1, units="<6560><6561>")},
        "turn 1 has the unit 6561",
    ),
    "units unreadable": (
        {"turns": turns_but(1, units="<1>,two")},
        "turn 1: its units are no list of whole numbers",
    ),
    "units of another type": (
        {"turns": turns_but(1, units=[1.5])},
        "turn 1: its units are no list of whole numbers",
    ),
    "reply without text": ({"turns": turns_but(1, text=None)}, "turn 1 has no text"),
    "text empty": ({"turns": turns_but(0, text=" ")}, "turn 0 has no text"),
    "text of half a character": ({"turns": turns_but(0, text="\ud800")}, "turn 0 has no text"),
    "roles": ({"turns": turns_but(1, role="user")}, "turn 1 is of 'user', expected 'assistant'"),
    "no reply": (
        {"turns": turns_but(0)[:1]},
        "1 turns; expected the user's and the assistant's in turn",
    ),
    "no turns": ({"conversation": turns_but(0)}, "there is no list 'turns'"),
    "a turn of another type": ({"turns": ["hi", "ho"]}, "turn 0 is 'hi', expected an object"),
    "no object": ([], "it is [], expected an object"),
}


@pytest.fixture
def folder(tmp_path):
    recordings.save(tmp_path / "q.wav", np.linspace(-1, 1, 1600), 16000)
    recordings.save(tmp_path / "short.wav", np.ones(159), 16000)
    return tmp_path


def assert_refused(folder, *args: object, says) -> None:
    """Assert one error line that contains `says`, and a folder as it was before."""
    before = sorted(folder.iterdir())
    code, _ = run(*args, "--out", folder / "new" / "out")
    assert (
        isinstance(code, str) and code.startswith("error: ") and "\n" not in code and says in code
    ), code
    assert sorted(folder.iterdir()) == before


def test_damaged_dialogues_are_counted_and_named(folder):
    bad = [
        json.dumps(item | {"id": name} if isinstance(item, dict) else item)
        for name, (item, _) in DAMAGED.items()
    ]
    good = json.dumps({"id": "good", "turns": turns_but(0)})
    (folder / "data.jsonl").write_text("\n".join([*bad[:9], good, '{"id"', *bad[9:]]))
    code, printed = run("--source", folder, "--out", folder / "out")
    assert code == 0
    data = Dataset(folder / "out")
    assert [data.dialogue(i).id for i in range(len(data))] == ["good"]
    counts = {
        "audio missing": 1,
        "audio unreadable": 2,
        "no text": 3,
        "unit out of range": 3,
        "roles not in turn": 2,
        "no turns": 3,
        "no JSON": 1,
    }
    for kind, count in counts.items():
        assert (
            f"left out: {kind}" in printed
            and f" {count} " in printed[printed.index(kind) :].splitlines()[0]
        )
    for name in (
        "audio missing (dialogue 0): turn 0: ",
        "unit below (dialogue 6): turn 1 has the unit -1",
        f"line 11 of {folder}/data.jsonl",
    ):
        assert name in printed


@pytest.mark.parametrize("name", DAMAGED)
def test_strict(name, folder):
    item, says = DAMAGED[name]
    good = {"turns": turns_but(0)}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [good, item, good])))
    assert_refused(
        folder, "--source", folder, "--strict", says=f"{folder}: dialogue 1: {says.format(folder)}"
    )


def test_values_beyond_the_limits_of_python(folder, monkeypatch):
    """Nesting and digits that Python refuses; elements and lines around them are read."""
    good = json.dumps({"id": "good", "turns": turns_but(0)})
    monkeypatch.setattr(json_files, "MAX_DIALOGUE", 2**15)
    bad = ["[" * 5000 + '"]"' + "]" * 5000, f'{{"id": {"9" * 5000}}}', f'"{"x" * 2**15}"']
    (folder / "data.jsonl").write_text("\n".join([good, *bad, good]))
    code, printed = run("--source", folder, "--out", folder / "out")
    assert code == 0 and len(Dataset(folder / "out")) == 2
    assert "left out: no JSON" in printed and "line 4 of" in printed
    array = f"[{good}, {bad[0]}, {bad[1]}, {good}]".replace("turns", "conversation")
    (folder / "x.json").write_text(array.replace("role", "from").replace("audio", "speech"))
    for block in (100, 2**20):
        monkeypatch.setattr(json_files, "BLOCK", block)
        items = [item for item, _ in json_files.json_array(folder / "x.json")]
        assert [type(item) for item in items] == [dict, SourceError, SourceError, dict]
    (folder / "x.json").write_text("[" + "[" * 5000)
    assert_refused(folder, "--source", folder / "x.json", says="x.json is no JSON, or is cut short")


def test_long_recordings_are_left_out(folder):
    recordings.save(folder / "long.wav", np.zeros(32000), 16000)
    (folder / "data.jsonl").write_text(
        "\n".join(json.dumps({"turns": turns_but(0, audio=name)}) for name in ("q.wav", "long.wav"))
    )
    code, printed = run("--source", folder, "--out", folder / "out", "--max-seconds", 0.5)
    assert code == 0 and len(Dataset(folder / "out")) == 1
    assert "long.wav is 2.00 s long; at most 0.5 s fit" in printed
    for seconds in (0, "nan", 4000):
        assert_refused(
            folder, "--source", folder, "--max-seconds", seconds, says="expected more than 0"
        )


PATHS = ["pipe", "loop", "/dev/zero", "/dev/null", "\0", "\ud800", "x" * 300, "a/" * 3000, "[/]x"]


@pytest.mark.parametrize("form", ["questions", "jsonl", "instructs2s"])
def test_paths_that_are_no_files(folder, form):
    """Counted and named, whatever the format; markup in names is printed as it is."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    turns = [turns_but(0, audio=path) for path in [*PATHS, "q.wav"]]
    text = "\n".join(json.dumps({"id": "[/]", "turns": value}) for value in turns)
    file = folder / "data.jsonl"
    if form != "jsonl":
        for old, new in (("turns", "conversation"), ("role", "from"), ("audio", "speech")):
            text = text.replace(f'"{old}"', f'"{new}"')
        text, file = f"[{text}]".replace("\n", ","), folder / "x.json"
    file.write_text(text)
    out = folder / "[/out]"
    code, printed = run("--source", file, "--format", form, "--out", out)
    assert code == 0 and len(Dataset(out)) == 1
    assert "[/] (dialogue 0): turn 0: " in printed and "is not a regular file" in printed


def test_sources_do_not_need_the_command_line():
    code = (
        "import sys, omni2_jax.train.data.sources;"
        "print([name for name in ('typer', 'jax', 'omni2_jax.cli') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_nothing_is_left(folder):
    (folder / "data.jsonl").write_text('{"id": "x", "turns": []}\n' * 2)
    assert_refused(
        folder,
        "--source",
        folder,
        says=f"nothing of {folder} can be used: "
        "2 x roles not in turn (first: x (dialogue 0): 0 turns",
    )
    (folder / "data.jsonl").write_text("\n")
    assert_refused(folder, "--source", folder, says="it holds no dialogue")


FILES = {
    "absent": ("x.json", None, "x.json does not exist"),
    "no data.jsonl": (".", None, "has no data.jsonl"),
    "no array": (
        "x.json",
        b'{"id": 1}',
        "x.json is no JSON array of dialogues, or is cut short: '{' where '[' is expected",
    ),
    "nothing": ("x.json", b"", "x.json is no JSON array"),
    "cut short": (
        "x.json",
        b'[{"id": 1, "conversation": []}, {"id": 2',
        "x.json is no JSON, or is cut short",
    ),
    "cut behind an item": (
        "x.json",
        b"[{}",
        "x.json is no JSON array of dialogues, or is cut short: '' where ',' is expected",
    ),
    "no text": ("x.json", b'[{"id": "\xff"}]', "x.json is no text in UTF-8"),
    "an empty array": ("x.json", b"[]", "it holds no dialogue"),
}


@pytest.mark.parametrize("name, content, says", FILES.values(), ids=FILES)
def test_a_source_that_is_none(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, "--source", tmp_path / name, says=says)


def test_other_bad_input(tmp_path):
    (tmp_path / "other").mkdir()
    assert_refused(
        tmp_path,
        "--source",
        SPOKEN,
        "--format",
        "csv",
        says="format 'csv'; expected one of questions, jsonl, recordings, instructs2s, vocalnet",
    )
    no_tokenizer = (
        f"{tmp_path}/other has no speech tokenizer (no speech_tokenizer.json); add one with "
        "omni2 convert --speech-tokenizer"
    )
    assert_refused(
        tmp_path, "--source", SPOKEN, "--speech-tokenizer", tmp_path / "other", says=no_tokenizer
    )
    (tmp_path / "other" / "speech_tokenizer.json").write_text('{"width": "wide"}')
    assert_refused(
        tmp_path,
        "--source",
        SPOKEN,
        "--speech-tokenizer",
        tmp_path / "other",
        says="not a speech tokenizer's configuration",
    )
    (tmp_path / "new" / "out").mkdir(parents=True)
    assert_refused(tmp_path, "--source", SPOKEN, says="out exists already; give a new directory")

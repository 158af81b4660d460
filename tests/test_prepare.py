"""`omni2 prepare`: three formats of sources, units made in batches, and damaged dialogues."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
from safetensors.numpy import save_file

from omni2_jax.audio import recordings
from omni2_jax.checkpoint import parameters
from omni2_jax.cli.main import main
from omni2_jax.config import Omni2Config
from omni2_jax.convert import read, write
from omni2_jax.models import speech_tokenizer
from omni2_jax.train.data import prepare, unit_batches
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.sources import SourceError, json_files
from tests.support.networks import TINY_TOKENIZER as TINY
from tests.support.networks import TOKENIZER_CLIPS as CLIPS
from tests.support.networks import draw_tokenizer
from tests.support.paths import AUDIO, GOLDENS, ROOT
from tests.support.releases import convert

EXAMPLES = ROOT / "examples" / "training"
SPEECH, WHISPER = AUDIO, GOLDENS / "whisper" / "tiny.pt"


def run(*args: object) -> tuple[str | int | None, str]:
    """Run `omni2 prepare` in this process: its exit value, and the report that it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omni2", "prepare", *map(str, args)])
        patch.setattr(prepare, "console", rich.console.Console(file=printed, width=250))
        with pytest.raises(SystemExit) as exit:
            main()
    return exit.value.code, printed.getvalue()


def prepared(source, out, *args: object) -> Dataset:
    code, printed = run("--source", source, "--out", out, *args)
    assert code == 0, (code, printed)
    return Dataset(out)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("units") / "s3.safetensors"
    save_file(draw_tokenizer(), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    """A checkpoint that holds only the speech tokenizer of the goldens."""
    out = tokenizer_file.with_name("ckpt")
    assert convert("--speech-tokenizer", tokenizer_file, "--out", out) == 0
    return out


# ---- recordings and units ----


def lines(*dialogues) -> str:
    """The content of a data.jsonl; a turn is (text, audio) or (text, audio, units)."""

    def keyed(number: int, turn: tuple) -> dict:
        return {"role": ("user", "assistant")[number % 2]} | dict(
            zip(("text", "audio", "units"), turn, strict=False)
        )

    items = [
        {"id": f"d{number}", "turns": [keyed(i, turn) for i, turn in enumerate(turns)]}
        for number, turns in enumerate(dialogues)
    ]
    return "\n".join(map(json.dumps, items))


def test_units_are_those_of_every_clip_alone(tokenizer, tmp_path):
    """Replies of seven lengths in batches of two; one brings its own units."""
    replies = [str(SPEECH / f"{name}.wav") for name in CLIPS] + sorted(
        map(str, EXAMPLES.glob("*-a.wav"))
    )
    dialogues = [[("hi", None), ("yes", reply)] for reply in replies]
    dialogues.insert(1, [("hi", None), ("no", replies[0], [0, 6560])])
    (tmp_path / "data.jsonl").write_text(lines(*dialogues))
    data = prepared(tmp_path, tmp_path / "out", "--speech-tokenizer", tokenizer, "--batch", 2)
    units = [data.dialogue(i).turns[1].units for i in range(len(data))]
    np.testing.assert_array_equal(units.pop(1), [0, 6560])
    for name, row in zip(CLIPS, units, strict=False):
        np.testing.assert_array_equal(
            row, np.load(GOLDENS / "s3tokenizer" / f"{name}.npz")["codes"]
        )
    net = speech_tokenizer.load(tokenizer)
    for reply, row in zip(replies, units, strict=True):
        wav, length = recordings.pad([recordings.load(reply)], 48000)
        codes, count = speech_tokenizer.tokenize(net, wav, length)
        np.testing.assert_array_equal(row, codes[0, : count[0]])
    assert (data.info.tokenizer, data.info.fingerprint) == (
        str(tokenizer),
        speech_tokenizer.fingerprint(net),
    )


def test_batches_have_few_shapes(monkeypatch):
    """Recordings up to 2 minutes, four at a time; a stand-in for the tokenizer notes its input."""
    shapes = []

    def tokenize(_, wav, lengths):
        shapes.append((len(wav), wav.shape[1] / recordings.INPUT_RATE))
        assert [np.count_nonzero(row) for row in wav] == lengths.tolist()
        return np.repeat(lengths[:, None], wav.shape[1], axis=1), lengths

    monkeypatch.setattr(unit_batches, "tokenize", tokenize)
    seconds = np.random.default_rng(0).permutation(
        [1, 2, 3, 4, 6, 7, 10, 14, 19, 29, 30, 31, 61, 120]
    )
    units = unit_batches.batched_units(
        None, [np.ones(n * recordings.INPUT_RATE, np.float32) for n in seconds], 4
    )
    assert (
        [len(row) for row in units]
        == [row[0] for row in units]
        == [n * recordings.INPUT_RATE for n in seconds]
    )
    assert shapes == [(4, 6), (4, 15), (4, 60), (4, 120)]
    assert [unit_batches.fixed_length(samples) for samples in (160, 48000, 48001)] == [
        48000,
        48000,
        96000,
    ]


def test_the_examples(tmp_path):
    """16-bit recordings at their role's rate are stored bit for bit, others are resampled."""
    data = prepared(EXAMPLES, tmp_path / "out")
    assert (
        data.info.dialogues,
        data.info.turns,
        data.info.clips,
        data.info.replies_with_units,
    ) == (4, 10, 10, 0)
    for dialogue, line in zip(
        map(data.dialogue, range(4)),
        (EXAMPLES / "data.jsonl").read_text().splitlines(),
        strict=True,
    ):
        item = json.loads(line)
        assert dialogue.id == item["id"]
        for turn, expected in zip(dialogue.turns, item["turns"], strict=True):
            assert (turn.role, turn.text, turn.units) == (expected["role"], expected["text"], None)
            wav = recordings.load(
                EXAMPLES / expected["audio"], 16000 if turn.role == "user" else 24000
            )
            assert turn.samples == len(wav)
            np.testing.assert_allclose(
                data.clip(turn.clip), wav, rtol=0, atol=0 if turn.role == "user" else 0.51 / 32768
            )


def test_a_long_question_is_kept_whole(tmp_path):
    recordings.save(tmp_path / "long.wav", np.zeros(31 * 16000), 16000)
    (tmp_path / "data.jsonl").write_text(lines([("hm", "long.wav"), ("yes", None)]))
    turns = prepared(tmp_path, tmp_path / "out").dialogue(0).turns
    assert turns[0].samples == 31 * 16000 and turns[1].clip is None and turns[1].units is None


def test_a_question_that_nobody_asks(tmp_path):
    """A user's recording may have the text "", a turn without a recording may not."""
    recordings.save(tmp_path / "quiet.wav", np.zeros(16000), 16000)
    turns = [[("", "quiet.wav"), ("Pardon?", None)], [("", None), ("Pardon?", None)]]
    (tmp_path / "data.jsonl").write_text(lines(*turns, [("Q?", None), ("", "quiet.wav")]))
    data = prepared(tmp_path, tmp_path / "out")
    assert [turn.text for turn in data.dialogue(0).turns] == ["", "Pardon?"] and len(data) == 1


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


def test_other_bad_input(tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    assert_refused(
        tmp_path,
        "--source",
        EXAMPLES,
        "--format",
        "csv",
        says="format 'csv'; expected one of questions, jsonl, recordings, instructs2s, vocalnet",
    )
    no_tokenizer = (
        f"{tmp_path}/other has no speech tokenizer (no speech_tokenizer.json); add one with "
        "omni2 convert --speech-tokenizer"
    )
    assert_refused(
        tmp_path, "--source", EXAMPLES, "--speech-tokenizer", tmp_path / "other", says=no_tokenizer
    )
    (tmp_path / "other" / "speech_tokenizer.json").write_text('{"width": "wide"}')
    assert_refused(
        tmp_path,
        "--source",
        EXAMPLES,
        "--speech-tokenizer",
        tmp_path / "other",
        says="not a speech tokenizer's configuration",
    )
    (tmp_path / "new" / "out").mkdir(parents=True)
    assert_refused(tmp_path, "--source", EXAMPLES, says="out exists already; give a new directory")


# ---- the speech tokenizer as a part of a checkpoint ----


def test_tokenizer_alone(tokenizer, capsys, monkeypatch):
    assert parameters.parts(tokenizer) == ["speech_tokenizer"]
    assert speech_tokenizer.load_config(tokenizer) == TINY
    assert Omni2Config.load(tokenizer / "config.json") == Omni2Config().only()
    wav, name = recordings.load(SPEECH / f"{CLIPS[0]}.wav"), CLIPS[0]
    net = speech_tokenizer.load(tokenizer)
    codes, _ = speech_tokenizer.tokenize(net, wav[None])
    np.testing.assert_array_equal(
        codes[0], np.load(GOLDENS / "s3tokenizer" / f"{name}.npz")["codes"]
    )
    before = speech_tokenizer.fingerprint(net)
    net.project.bias[...] += 1e-6
    assert (
        speech_tokenizer.fingerprint(net)
        != before
        == speech_tokenizer.fingerprint(speech_tokenizer.load(tokenizer))
    )
    monkeypatch.setattr(sys, "argv", ["omni2", "info", str(tokenizer)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "speech_tokenizer" in printed and "6561" in printed
    assert f"{sum(array.size for array in draw_tokenizer().values()):,}" in printed


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of something else, to be extended."""
    assert convert("--whisper", WHISPER, "--out", tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def content(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_tokenizer_joins_a_checkpoint(whole, tokenizer, tokenizer_file):
    before = content(whole)
    assert convert("--speech-tokenizer", tokenizer_file, "--out", whole) == 0
    after = content(whole)
    assert before.items() <= after.items()
    assert {path.parts[:2] for path in after.keys() - before.keys()} == {
        ("speech_tokenizer.json",),
        ("params", "speech_tokenizer"),
    }
    assert speech_tokenizer.fingerprint(
        speech_tokenizer.load(whole)
    ) == speech_tokenizer.fingerprint(speech_tokenizer.load(tokenizer))
    assert "has speech_tokenizer already" in convert(
        "--speech-tokenizer", tokenizer_file, "--out", whole
    )
    assert content(whole) == after


def test_tokenizer_beside_other_sources(tokenizer, tokenizer_file, tmp_path):
    """And other parts join a checkpoint of a tokenizer."""
    assert (
        convert(
            "--speech-tokenizer", tokenizer_file, "--whisper", WHISPER, "--out", tmp_path / "both"
        )
        == 0
    )
    shutil.copytree(tokenizer, tmp_path / "later")
    assert convert("--whisper", WHISPER, "--out", tmp_path / "later") == 0
    for name in ("both", "later"):
        assert parameters.parts(tmp_path / name) == ["speech_encoder", "speech_tokenizer"]
        assert speech_tokenizer.load_config(tmp_path / name) == TINY


def test_a_tokenizer_that_is_none(whole, tmp_path):
    before = content(whole)
    state = draw_tokenizer()
    state["encoder.blocks.0.attn_ln.weight"] = state["encoder.blocks.0.attn_ln.weight"][:-1]
    save_file(state, tmp_path / "bad.safetensors")
    (tmp_path / "none.onnx").write_bytes(b"no onnx")
    for name, says in (
        ("bad.safetensors", "attn_ln.weight has shape [127], expected [128]"),
        ("none.onnx", "none.onnx"),
        ("gone", "exist"),
    ):
        for out in (whole, tmp_path / "new"):
            message = convert("--speech-tokenizer", tmp_path / name, "--out", out)
            assert message.startswith("error: ") and "\n" not in message and says in message
    assert content(whole) == before and not (tmp_path / "new").exists()


def test_a_cut_leaves_the_checkpoint_as_it_was(whole, tokenizer_file, monkeypatch):
    before = content(whole)
    monkeypatch.setattr(write.Omni2Config, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write.extend(whole, read.read_speech_tokenizer(tokenizer_file), {})
    assert content(whole) == before


# ---- as a job ----


@pytest.fixture
def spoken(tmp_path):
    """24 dialogues in groups of four; the sixth cannot be used."""
    for name in CLIPS:
        shutil.copy(SPEECH / f"{name}.wav", tmp_path)
    dialogues = [[("hi", None), ("yes", f"{CLIPS[i % len(CLIPS)]}.wav")] for i in range(24)]
    shutil.copy(SPEECH / f"{CLIPS[0]}.wav", tmp_path / "first.wav")
    dialogues[0] = [("hi", None), ("yes", "first.wav")]
    dialogues[5] = [("hi", "gone.wav"), ("no", None)]
    (tmp_path / "data.jsonl").write_text(lines(*dialogues))
    return tmp_path


@pytest.fixture
def whole_run(spoken, tokenizer):
    """The arguments of a run, and the files and the report that it leaves."""
    args = ("--source", spoken, "--speech-tokenizer", tokenizer, "--batch", 1)
    code, printed = run(*args, "--out", spoken / "all")
    assert code == 0 and not (spoken / "all.work").exists()
    return args, content(spoken / "all"), printed.replace("/all ", "/out ")


def test_a_killed_run_goes_on(spoken, whole_run):
    args, files, printed = whole_run
    options = [sys.executable, "-m", "omni2_jax", "prepare", *map(str, args), "--workers", "1"]
    process = subprocess.Popen([*options, "--out", str(spoken / "out")], cwd=ROOT)
    journal = spoken / "out.work" / "journal-0-of-1.jsonl"
    while not journal.exists() or b"groups/" not in journal.read_bytes():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 0 < len(content(spoken / "out.work" / "groups")) < 6 and not (spoken / "out").exists()
    code, _ = run(*args, "--out", spoken / "out", "--max-seconds", 500)
    assert "was begun with max_seconds 600.0, not 500.0" in str(code)
    (spoken / "first.wav").unlink()  # it is in the first group, which is not made again
    code, again = run(*args, "--out", spoken / "out")
    assert (code, again) == (0, printed) and content(spoken / "out") == files
    assert not (spoken / "out.work").exists()


def test_shards_are_merged(spoken, whole_run):
    args, files, printed = whole_run
    for index in (1, 0):
        code, _ = run(*args, "--out", spoken / "out", "--shard", f"{index}/2")
        assert code == 0 and not (spoken / "out").exists()
        if index:
            code, _ = run(*args, "--out", spoken / "out")
            assert "3 groups of dialogues are missing" in str(code) and "--shard 0/2" in str(code)
    code, again = run(*args, "--out", spoken / "out")
    assert (code, again) == (0, printed) and content(spoken / "out") == files


def test_strict_after_a_run_that_was_not(spoken, whole_run):
    args, _, _ = whole_run
    run(*args, "--out", spoken / "out", "--shard", "0/2")
    run(*args, "--out", spoken / "out", "--shard", "1/2")
    code, _ = run(*args, "--out", spoken / "out", "--strict")
    assert f"{spoken}: d5 (dialogue 5): turn 0: " in str(code) and not (spoken / "out").exists()

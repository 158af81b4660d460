"""Reports: measured rows stand beside the paper's, each marked, and plots are drawn."""

import dataclasses
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from omni2_jax.evaluate import results as result_files
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.report import published
from omni2_jax.evaluate.report.write import write_report
from omni2_jax.evaluate.results import Results, TaskResult


def summary(**values: float) -> dict[str, Estimate]:
    return {name: Estimate(value, value - 1, value + 1, 20) for name, value in values.items()}


def task(groups: dict | None = None, **values: float) -> TaskResult:
    return TaskResult({}, 20, {}, summary(**values), groups or {})


def write(
    folder: Path,
    dataset: str,
    rows: tuple[str, ...] = (),
    label="toy",
    system=None,
    more=(),
    **tasks,
) -> Path:
    """Results of a system as `omni2 evaluate` writes them.

    system: more of its description. more: words of the command.
    """
    results = Results(
        label=label,
        dataset=dataset,
        rows=list(rows),
        system={"kind": "checkpoint", "options": {"seed": 0}} | (system or {}),
        data={"name": "items.jsonl", "items": 20, "sha256": "0"},
        recogniser=None,
        tasks={name.replace("_", "-"): found for name, found in tasks.items()},
        notes=["the recogniser heard nothing"],
        command=["omni2", "evaluate", *more],
        environment=result_files.environment(),
    )
    folder.mkdir(parents=True)
    results.save(folder)
    return folder


def rows_of(report: Path, title: str) -> list[list[str]]:
    """The cells of the table below a heading that begins with `title`."""
    section = report.read_text().split(f"## {title}")[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]


def is_picture(path: Path) -> bool:
    """Whether a PNG shows more than one color."""
    return bool(np.ptp(matplotlib.image.imread(path)[..., :3]) > 0.5)


def test_table_1(tmp_path):
    """One row a system, from its results on several data sets."""
    write(tmp_path / "a", "llama-questions", spoken_qa=task(s2t=50.0, s2s=40.0))
    write(tmp_path / "b", "speech-web-questions", spoken_qa=task(s2t=30.0, s2s=20.0))
    write(tmp_path / "c", "alpacaeval", asr_wer=task(wer=3.5), latency=task(first_audio=400.0))
    groups = {"topic": {"x": summary(wer=1.0), "y": summary(wer=9.0)}}
    write(tmp_path / "d", "other", label="new", asr_wer=task(groups, wer=5.0))
    report = write_report([tmp_path], tmp_path / "report")
    head, _, *lines = rows_of(report, "Table 1")
    by_label = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert [line[1] for line in lines] == ["published"] * 11 + ["measured here"] * 2
    assert by_label["LLaMA-Omni2-7B"]["Llama Q. S2S"] == "60.7"
    assert by_label["GLM-4-Voice 9B"]["ASR-WER %"] == "9.02"
    assert by_label["toy"]["Llama Q. S2S"] == "**40.0** [39.0, 41.0] (20)"
    assert by_label["toy"]["Web Q. S2T"] == "**30.0** [29.0, 31.0] (20)"
    assert by_label["toy"]["latency ms"].startswith("**400.00**")
    assert by_label["toy"]["score S2S"] == "-" and by_label["new"]["latency ms"] == "-"
    text = report.read_text()
    assert "arXiv 2505.02625" in text and "note: the recogniser heard nothing" in text
    assert "new on other, asr-wer by topic" in text and "options (seed 0)" in text
    for name in ("table1.png", "new-other-asr-wer-topic.png"):
        assert f"]({name})" in text and is_picture(tmp_path / "report" / name)
    assert "Table 2" not in text


def lines_of(report: Path, title: str) -> list[list[str]]:
    """The measured lines of a table, labels and values, without columns that none of them has."""
    _, _, *lines = rows_of(report, title)
    measured = [line for line in lines if line[1] == "measured here"]
    empty = {i for i in range(len(measured[0])) if {line[i] for line in measured} == {"-"}}
    kept = [[cell for i, cell in enumerate(line) if i not in empty | {1}] for line in measured]
    return [[label, *(cell.split(" ")[0].strip("*") for cell in cells)] for label, *cells in kept]


def test_systems_of_one_name(tmp_path):
    """Each is a line of its own: other checkpoints, other settings, and what is measured twice.

    Several commands about one of them are one line: with and without a clock, in text alone.
    """
    final = {"name": "final", "checksum": 10 * "a"}
    for number, (system, tasks) in enumerate(
        (
            (final | {"timed": False}, {"spoken_qa": task(s2t=1.0, s2s=2.0)}),
            (final | {"timed": True}, {"latency": task(first_audio=3.0)}),
            (final | {"timed": False, "speech": False}, {"text_qa": task(s2t=4.0)}),
            (final | {"timed": False}, {"spoken_qa": task(s2t=5.0, s2s=6.0)}),
            ({"name": "final", "checksum": 10 * "b"}, {"latency": task(first_audio=7.0)}),
        )
    ):
        write(tmp_path / str(number), "talk", label="final", system=system, **tasks)
    report = write_report([tmp_path], tmp_path / "report")
    assert lines_of(report, "Table 1") == [
        ["final (checksum aaaaaaaa)", "3.00", "1.0", "2.0"],
        ["final (checksum aaaaaaaa) (2)", "-", "5.0", "6.0"],
        ["final (checksum bbbbbbbb)", "7.00", "-", "-"],
    ]
    assert "### final (checksum bbbbbbbb) on talk" in report.read_text()
    # By default the settings belong to a system; a label of the user's stands for the checkpoint.
    for number, (label, more, expected) in enumerate(
        (
            ("final", (), ["final (temperature 0)", "final (temperature 1)"]),
            ("final", ("--label", "final"), ["final"]),
            ("mine", ("--label=mine",), ["mine"]),
        )
    ):
        folder = tmp_path / f"label-{number}"
        for temperature in (0, 1):
            system = final | {"options": {"temperature": temperature}}
            found = ({"latency": task(first_audio=1.0)}, {"asr_wer": task(wer=2.0)})[temperature]
            write(folder / str(temperature), "talk", (), label, system, more, **found)
        report = write_report([folder], folder / "report")
        assert [line[0] for line in lines_of(report, "Table 1")] == expected


def test_data_sets_of_one_column(tmp_path):
    """Noise has lines of its own; a line says which of several data sets it shows."""
    for dataset, wer in (
        ("llama-questions", 1.0),
        ("llama-questions, noise 10 dB", 2.0),
        ("llama-questions, noise -5 dB", 3.0),
        ("vicuna", 4.0),
    ):
        groups = {"topic": {"x": summary(wer=wer), "y": summary(wer=9.0)}}
        found = {"spoken_qa": task(s2t=wer), "asr_wer": task(groups, wer=wer)}
        write(tmp_path / dataset, dataset, **found)
    report = write_report([tmp_path], tmp_path / "report")
    assert [line[:3] for line in lines_of(report, "Table 1")] == [
        ["toy", "1.0", "4.00"],
        ["toy, noise -5 dB", "3.0", "3.00"],
        ["toy, noise 10 dB", "2.0", "2.00"],
    ]
    assert "\n\ntoy: ASR-WER % on vicuna; on llama-questions: see below.\n\n" in report.read_text()


def test_plots_of_like_names(tmp_path):
    """None is written over another one: their names are numbered."""
    for number, label in enumerate(("a b", "a-b", "a+b")):
        groups = {"topic": {"x": summary(wer=1.0), "y": summary(wer=9.0)}}
        write(tmp_path / str(number), "talk", label=label, asr_wer=task(groups, wer=5.0))
    text = write_report([tmp_path], tmp_path / "report").read_text()
    for name in ("a-b-talk-asr-wer-topic", "a-b-talk-asr-wer-topic-2", "a-b-talk-asr-wer-topic-3"):
        assert text.count(f"]({name}.png)") == 1 and is_picture(tmp_path / f"report/{name}.png")


def test_spectrograms_of_several_evaluations(tmp_path):
    """Of each the same recording; its pictures stand below its name."""
    for number, label in enumerate(("one", "two")):
        folder = write(tmp_path / label, "talk", label=label, asr_wer=task(wer=5.0)) / "copies"
        folder.mkdir()
        (folder / "sea.png").write_bytes(bytes([number]))
    report = write_report([tmp_path], tmp_path / "report")
    for number, label in enumerate(("one", "two")):
        below = f"### {label} on talk\n\n![sea](copy-{number}-sea.png)"
        assert below in report.read_text()
        assert (tmp_path / "report" / f"copy-{number}-sea.png").read_bytes() == bytes([number])


def test_tables_of_ablations(tmp_path):
    """A measured row follows the published one; points of a grid need none."""
    for mix in ("gate", "sum"):
        write(tmp_path / mix, "talk", (f"table2/{mix}",), mix, asr_wer=task(wer=12.0))
    for row, latency in (("table4/1-5", 90.0), ("table4/10-40", 250.0), ("table4/3-10", 150.0)):
        found = {"asr_wer": task(wer=7.0), "latency": task(first_audio=latency)}
        write(tmp_path / row.replace("/", "-"), "talk", (row,), "toy", **found)
    report = write_report([tmp_path], tmp_path / "report")
    assert [line[0] for line in rows_of(report, "Table 2")[2:]] == [
        "gate fusion",
        "gate fusion: gate",
        "without the gate: hidden state + embedding",
        "without the gate: hidden state + embedding: sum",
        "without the text embedding: hidden state alone",
    ]
    labels = [line[0] for line in rows_of(report, "Table 4")[2:]]
    assert labels[:2] == ["R = 1, W = 5", "R = 1, W = 5: toy"]
    assert labels[-1] == "R = 10, W = 40: toy"
    for name in ("table2.png", "table4.png"):
        assert is_picture(tmp_path / "report" / name)
    assert "Table 1" not in report.read_text()


def test_published_numbers():
    """The columns of all tables exist, and the rows agree where the paper repeats a measurement."""
    tables = published.published().tables
    assert list(tables) == [f"table{number}" for number in range(1, 6)]
    for table in tables.values():
        assert set(table.columns) <= set(published.COLUMNS)
        assert all(set(row.values) <= set(table.columns) for row in table.rows)
    whole = tables["table1"].row("7b").values
    for name, row in {"table2": "gate", "table3": "streaming", "table4": "3-10"}.items():
        assert tables[name].row(row).values.items() <= whole.items()
    assert tables["table5"].row("200k-multi").values.items() <= whole.items()
    published.check_rows(["table1/7b", "table4/9-99"])
    with pytest.raises(ValueError, match="--row table4/x is no row of the paper"):
        published.check_rows(["table4/x"])


def test_bad_results(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        write_report([tmp_path], tmp_path / "report")
    path = write(tmp_path / "a", "talk", asr_wer=task(wer=1.0)) / "results.json"
    with pytest.raises(ValueError, match=r"no_run has no metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report", [tmp_path / "no_run"])
    for content, words in (("{", "it is not JSON"), ("{}", "label is missing")):
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            write_report([tmp_path], tmp_path / "report")
        line = str(error.value)
        assert line.startswith(f"{path} holds no results") and words in line and "\n" not in line
    assert not (tmp_path / "report").exists()


def test_results_come_back(tmp_path):
    folder = write(tmp_path / "a", "talk", asr_wer=task(wer=1.0))
    results = Results.load(folder / "results.json")
    assert results.tasks["asr-wer"].metrics == summary(wer=1.0)
    again = dataclasses.asdict(results)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(again))

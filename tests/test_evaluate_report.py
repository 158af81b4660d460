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


def write(folder: Path, dataset: str, rows: tuple[str, ...] = (), label="toy", **tasks) -> Path:
    """Results of a system as `omni2 evaluate` writes them."""
    results = Results(
        label=label,
        dataset=dataset,
        rows=list(rows),
        system={"kind": "checkpoint", "options": {"seed": 0}},
        data={"name": "items.jsonl", "items": 20, "sha256": "0"},
        recogniser=None,
        tasks={name.replace("_", "-"): found for name, found in tasks.items()},
        notes=["the recogniser heard nothing"],
        command=["omni2", "evaluate"],
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

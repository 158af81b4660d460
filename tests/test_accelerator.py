"""benchmarks.accelerator: figures after each measurement, and what happens to those that fail."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import sizes
from benchmarks.accelerator import (
    Measurement,
    Process,
    chosen,
    figures_of,
    fits,
    measure,
    measurements,
)
from benchmarks.device import busy
from omni2_jax.checkpoint import parameters

SERVING = {
    "device": "NVIDIA H100",
    "warm_up_s": 60.0,
    "first_audio_ms": 80.0,
    "rtf": 0.05,
    "text_token_ms": 1.5,
    "unit_ms": 1.25,
    "flow_vocoder_ms": 9.0,
    "roofline": {
        "copy_bytes_per_s": 3e12,
        **{part: {"fraction": 0.85} for part in ("text", "units", "flow and vocoder")},
    },
    "audio_s_per_s": {"1": 20.0, "64": 500.0},
    "realtime_speakers": 64,
}
PROGRAM = f"""
import json, pathlib, sys, time
what, path, ready = sys.argv[1], sys.argv[3], pathlib.Path(sys.argv[5])
if what == "never":
    time.sleep(600)
while what == "slow" and not (ready.parent / "journal").read_text().endswith("measured\\n"):
    with open(ready.parent / "journal", "a") as journal:
        print("compiles", file=journal)
    time.sleep(0.01)
if what == "large" and not (tried := ready.parent / "tried").exists():
    tried.touch()
    sys.exit("error: out of memory")
ready.touch()
with open(ready.parent / "journal", "a") as journal:
    print("ready", file=journal)
sys.stdin.readline()
with open(ready.parent / "journal", "a") as journal:
    print("measures", file=journal)
if what == "hang":
    open(path, "w").write('{{"device": "NVIDIA H100"}}')
    time.sleep(600)
if what == "fail":
    sys.exit("error: out of memory")
if what == "long":
    time.sleep(1)
    with open(ready.parent / "journal", "a") as journal:
        print("measured", file=journal)
json.dump({SERVING!r}, open(path, "w"))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [
        Measurement("one", ("stand_in", "ok")),
        Measurement("large", ("stand_in", "fail")),
        Measurement("graphs", ("stand_in", "ok"), gpu=True),
    ]


def test_figures_are_written_after_each(plan, tmp_path):
    found = measure(plan, tmp_path, 60)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["large"]["failed"] == "error: out of memory"
    page = (tmp_path / "figures.md").read_text()
    assert "| one | real-time factor | 0.0500 |" in page
    assert "| one | audio a second, 64 slots | 500.0 s |" in page
    assert "| large | failed | error: out of memory |" in page
    assert "graphs" in found


def test_what_is_measured_is_kept_and_the_rest_goes_on(plan, tmp_path):
    measure(plan[:1], tmp_path, 60)
    kept = json.loads((tmp_path / "results.json").read_text())["one"] | {"rtf": 0.04}
    (tmp_path / "results.json").write_text(json.dumps({"one": kept}))
    assert measure(plan, tmp_path, 60)["one"]["rtf"] == 0.04


def test_the_time_runs_out(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.accelerator.SHORTEST", 0.5)
    found = measure([Measurement("hang", ("stand_in", "hang")), plan[1]], tmp_path, 2)
    assert "the time ran out" in found["hang"]["failed"] and "large" not in found
    assert found["hang"]["device"] == "NVIDIA H100"  # what it had measured by then is kept


def test_what_is_ready_measures_while_the_others_are_paused(tmp_path, plan):
    (tmp_path / "journal").touch()
    long = Measurement("long", ("stand_in", "long"))
    found = measure([long, Measurement("slow", ("stand_in", "slow"))], tmp_path, 60, together=2)
    assert found["long"]["rtf"] == found["slow"]["rtf"] == 0.05
    lines = (tmp_path / "journal").read_text().split()
    first, last = lines.index("measures"), lines.index("measured")
    assert "compiles" not in lines[first:last]
    assert lines[last:] and lines[-2:] == ["ready", "measures"]


def test_one_that_fails_beside_others_is_tried_alone(plan, tmp_path):
    large = Measurement("large", ("stand_in", "large"))
    found = measure([plan[0], large], tmp_path, 60, together=2)
    assert found["one"]["rtf"] == found["large"]["rtf"] == 0.05


def test_what_is_ready_in_time_is_measured(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.accelerator.SHORTEST", 1)
    never = Measurement("never", ("stand_in", "never"))
    found = measure([plan[0], never], tmp_path, 8, together=2)
    assert found["one"]["rtf"] == 0.05
    assert found["never"]["failed"] == "the time ran out while it was compiling"


def test_what_prepares_together(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: None)

    def named(name, gigabytes=10.0):
        return Measurement(name, (), gigabytes=gigabytes)

    running = [Process(named("a"), tmp_path), Process(named("b", 30), tmp_path)]
    assert fits(named("c"), running, 3) and not fits(named("c"), running, 2)
    assert fits(named("c", 30), running, 3) and not fits(named("c", 31), running, 3)
    assert fits(named("as large as the device", 80), [], 3)


def test_memory_to_serve():
    memory = {one.name: one.gigabytes for one in measurements(["0.5b", "7b"], [64, 256], 20)}
    assert 5 < memory["one speaker, 0.5b"] < 15 and 30 < memory["one speaker, 7b"] < 45
    assert memory["64 speakers, 0.5b"] == pytest.approx(memory["one speaker, 0.5b"] + 63 * 0.25)


def test_only_some():
    planned = measurements(["0.5b", "7b"], [64, 256], 20)
    names = [one.name for one in chosen(planned, ["256", "CUDA graphs", "loops as"])]
    assert names == [
        "256 speakers, 0.5b",
        "one speaker, 0.5b, loops as CUDA graphs",
        "one speaker, 0.5b, loops and branches as CUDA graphs",
        "one speaker, 7b, loops and branches as CUDA graphs",
    ]
    assert chosen(planned, None) == planned
    with pytest.raises(ValueError, match="no measurement has '32 sp' in its name; they are: one"):
        chosen(planned, ["256", "32 sp"])


def test_the_most_telling_come_first():
    names = [one.name for one in measurements(["0.5b", "7b"], [64, 256], 20)]
    assert names[:3] == ["one speaker, 0.5b", "one speaker, 7b", "64 speakers, 0.5b"]
    assert "256 speakers, 0.5b" in names
    elsewhere = [one.name for one in measurements(["0.5b", "7b"], [64, 256], 20, gpu=False)]
    assert set(names) - set(elsewhere) == {
        "one speaker, 0.5b, loops as CUDA graphs",
        "one speaker, 0.5b, loops and branches as CUDA graphs",
        "one speaker, 7b, loops and branches as CUDA graphs",
        "stage 1a, 0.5b, without cuDNN",
    }


def test_figures_of_training():
    stage = {"device": "1 x H100", "mfu": 0.5, "seconds": 2, "data_wait": 0, "compile_s": 60}
    assert ("1a", "MFU", "50.0 %") in figures_of("1a", {"stages": [stage]})


def test_what_a_trace_says():
    events = [("fusion_1", 0, 2e6), ("fusion_27", 1e6, 2e6), ("gemm", 5e6, 1e6)]
    summary = busy(events, 0.008)
    assert summary["busy"] == pytest.approx(0.5)  # 0 to 3 ms and 5 to 6 ms, of 8 ms
    assert summary["kernels"] == 3
    assert summary["largest"] == [
        ["fusion", pytest.approx(4e-3), 2],
        ["gemm", pytest.approx(1e-3), 1],
    ]


def test_random_int8_weights_are_as_large_as_random_floats(monkeypatch):
    monkeypatch.setattr(sizes, "for_serving", lambda graph, params, donate: (graph, params))
    _, _, params = sizes.load("tiny", None, jnp.float32, int8=True)
    leaves = parameters.flatten(params["llm"])
    scales = [path for path in leaves if path.endswith("_scale")]
    assert scales
    for path in scales:
        matrix = leaves[path.removesuffix("_scale")]
        assert matrix.dtype == jnp.int8 and abs(matrix).max() == 127
        assert 0.02 / 127 < leaves[path].max() <= 0.03 / 127


@pytest.mark.nightly
@pytest.mark.slow
def test_at_tiny_size(tmp_path):
    """The real measurements, on the CPU: serving with one and two slots, and training."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--minutes", "30", "--size", "tiny"]
    command += ["--slots", "2", "--steps", "5", "--out", str(tmp_path)]
    one_device = os.environ | {"XLA_FLAGS": ""}  # not the eight of the tests
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=one_device)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    failed = {name: result["failed"] for name, result in found.items() if "failed" in result}
    assert not failed
    assert {"one speaker, tiny", "2 speakers, tiny", "stage 1a, tiny", "stage 2, tiny"} <= set(
        found
    )

"""Recipes, with a stand-in for `omni2` that notes what it is asked to do."""

import functools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from omni2_jax.evaluate.report import published
from omni2_jax.train import config_files
from tests.support.paths import EXAMPLES, ROOT

STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$LOG"; echo >> "$LOG"
command="$1 ${2:-}"
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
case $command in
    train*) mkdir -p "$out/final" ;;
    "synthesize dialogues") touch "$out" ;;
    "synthesize speech") mkdir -p "$out"; touch "$out"/{train,validation,test,metadata}.jsonl ;;
    prepare*|new*|frames*|hidden*|join*) mkdir -p "$out" ;;
esac
"""


@pytest.fixture
def recipe(tmp_path):
    """Run a recipe -> the arguments of each call of `omni2`, in order."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "omni2"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(name: str, *arguments: str, **variables: str) -> list[list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        given = {
            "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(log),
        }
        command = ["bash", ROOT / "recipes" / name, *arguments]
        environment = {**os.environ, **given, **variables}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return run


@pytest.fixture
def ablations(recipe, tmp_path):
    """As `recipe`, for ablations.sh."""

    def run(**variables: str) -> list[list[str]]:
        given = {
            "START": "start",
            "SOURCE": str(EXAMPLES / "training" / "data.jsonl"),
            "QUESTIONS": "llama-questions.jsonl other.jsonl",
            "WORK": str(tmp_path / "work"),
        }
        return recipe("ablations.sh", **{**given, **variables})

    return run


INPUTS = (
    "--data",
    "--source",
    "--dialogues",
    "--text",
    "--whisper",
    "--speech-tokenizer",
    "--system",
)
SETTINGS = ("checkpoint", "data", "validation", "frames", "hidden", "replay_data")  # that are paths


def options(call: list[str], name: str) -> list[str]:
    """The values of an option that may be repeated."""
    return [call[index + 1] for index, word in enumerate(call[:-1]) if word == name]


def test_ablations(ablations, tmp_path):
    """Every variant is trained from the right stage with settings that exist, and measured as a row
    that the paper has; what exists is not trained again."""
    calls, work = ablations(), tmp_path / "work"
    trained = {}
    for call in (call for call in calls if call[0] == "train"):
        sets = options(call, "--set")
        config = config_files.read(options(call, "--config")[0], sets)
        name = str(Path(options(call, "--out")[0]).relative_to(work))
        trained[name] = config
        source = Path(config.checkpoint)
        assert str(source) == "start" or source.exists()  # trained before
    assert len(trained) == 3 + 2 + 4 + 1 + 4 * 3
    assert trained["full/2"].mix == "gate" and trained["full/2-sum"].mix == "sum"
    assert trained["full/2-hidden"].mix == "hidden"
    assert trained["full/2-hidden"].checkpoint == trained["full/2"].checkpoint
    assert trained["full/1b-offline"].layout == "offline" and trained["full/2"].layout != "offline"
    assert trained["full/2-text"].checkpoint == str(work / "full/1a/final")
    assert trained["full/2-scratch"].reset == ("speech_lm",)
    rows = [row for call in calls for row in options(call, "--row")]
    published.check_rows(rows)
    known = {f"{name}/{row.id}" for name, table in published.published().tables.items()
             for row in table.rows if name in ("table2", "table3", "table5")}  # fmt: skip
    assert set(rows) == known | {"table4/offline"}
    assert calls[-1][:2] == ["evaluate", "report"]
    assert not any(call[0] in ("train", "prepare") for call in ablations())


def test_data_sets_of_table_5(ablations, tmp_path):
    """The first dialogues, with recordings that are found from anywhere; and single turns."""
    ablations(TABLES="5", SHARES="50")

    def read(name: str) -> list[dict]:
        path = tmp_path / "work" / name / "dialogues.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert [len(read(name)) for name in ("full", "share-50", "single")] == [4, 2, 4]
    assert max(len(one["turns"]) for one in read("full")) == 4
    assert {len(one["turns"]) for one in read("single")} == {2}
    sounds = [Path(turn["audio"]) for one in read("single") for turn in one["turns"]]
    assert all(sound.is_absolute() and sound.exists() for sound in sounds)


@pytest.mark.parametrize("small", ["", "1"])
def test_nano(recipe, tmp_path, small):
    """Every command of nano.sh reads what an earlier one has made, with settings that exist; the
    same script makes nothing twice."""
    run = functools.partial(
        recipe,
        "nano.sh",
        str(tmp_path / "nano"),
        OMNI2_WHISPER="whisper-tiny.en",
        VOICE="voice",
        SMALL=small,
    )
    made = {"whisper-tiny.en", "voice", str(EXAMPLES / "joe" / "checkpoint")}
    stages = []
    for call in run():
        read = [value for name in INPUTS for value in options(call, name)]
        if call[0] in ("train", "frames", "hidden"):
            config = config_files.read(options(call, "--config")[0], options(call, "--set"))
            read += [value for name in SETTINGS if (value := getattr(config, name))]
            if call[0] == "train":
                stages.append(config.stage)
                assert config.steps is not None and (config.steps == 2) == bool(small)
        for path in filter(None, read):
            assert made & {path, str(Path(path).parent)}, f"{path} of {call}"
        made |= set(options(call, "--out"))
    assert stages == ["text", "1a", "1b", "2"]
    assert {call[0] for call in run()} == {"evaluate"}

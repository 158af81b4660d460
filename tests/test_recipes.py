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
from omni2_jax.train.settings import TrainConfig
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
            "MEASURE": "--task asr-wer --recogniser whisper",
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


def trainings(calls: list[list[str]], given: set[str], base: Path) -> dict[str, TrainConfig]:
    """The settings of every `omni2 train` by its --out, from the calls of a recipe.

    Each call has to read what was given or what an earlier call has made. base: where relative
    paths start.
    """
    found = {}
    made = {str((base / path).resolve()) for path in given}
    for call in calls:
        read = [value for name in INPUTS for value in options(call, name)]
        if call[0] in ("train", "frames", "hidden"):
            config = config_files.read(options(call, "--config")[0], options(call, "--set"))
            read += [value for name in SETTINGS if (value := getattr(config, name))]
            if call[0] == "train":
                found[options(call, "--out")[0]] = config
        for path in filter(None, read):
            whole = (base / path).resolve()
            assert made & {str(whole), str(whole.parent)}, f"{path} of {call}"
        made |= {str((base / path).resolve()) for path in options(call, "--out")}
    return found


@pytest.mark.parametrize("small", ["", "1"])
def test_nano(recipe, tmp_path, small):
    """Every command of nano.sh reads what an earlier one has made, with settings that exist; the
    same script makes nothing twice."""
    work = tmp_path / "nano"
    variables = {"OMNI2_WHISPER": "whisper-tiny.en", "VOICE": "voice", "SMALL": small}
    run = functools.partial(recipe, "nano.sh", str(work), **variables)
    given = {"whisper-tiny.en", "voice", str(EXAMPLES / "joe" / "checkpoint")}
    configs = trainings(run(), given, work).values()
    assert [config.stage for config in configs] == ["text", "1a", "1b", "2"]
    assert all((config.steps == 2) == bool(small) and config.steps for config in configs)
    assert {call[0] for call in run()} == {"evaluate"}


@pytest.mark.parametrize("small", ["", "1"])
def test_voice(recipe, tmp_path, small):
    """As above, for voice.sh: each part starts from the checkpoint with the part before it."""
    work = tmp_path / "voice"
    variables = {"OMNI2_WHISPER": "whisper-tiny.en", "SMALL": small}
    run = functools.partial(recipe, "voice.sh", str(work), **variables)
    configs = trainings(run(), {"test.txt", "train.txt"}, work)
    assert [config.stage for config in configs.values()] == ["units", "vocoder", "flow"]
    assert [config.checkpoint for config in configs.values()] == [
        "start",
        "runs/units/final",
        "runs/vocoder/final",
    ]
    assert all((config.steps == 4) == bool(small) and config.steps for config in configs.values())
    assert {call[0] for call in run()} == {"evaluate"}


def test_nano_ablations(recipe, tmp_path):
    """Tables 2 and 5 start from Nano's own stage 1b, table 3 from equally short ones; stage 1a is
    not trained, and the hidden states are computed once for each set of dialogues."""
    work = tmp_path / "work"
    run = functools.partial(recipe, "nano_ablations.sh", str(work), OMNI2_WHISPER="whisper-tiny.en")
    calls = run()
    given = {str(EXAMPLES / "joe" / "checkpoint")}
    given |= {str(path.relative_to(work)) for path in work.glob("*/*/dialogues.jsonl")}
    configs = {
        str(Path(out).relative_to(work)): config
        for out, config in trainings(calls, given, work).items()
    }
    assert len(configs) == 3 * 3 + (2 + 5) + 4
    assert {config.stage for config in configs.values()} == {"1b", "2"}
    first = {name: config for name, config in configs.items() if name.startswith("fusion")}
    assert all(Path(config.checkpoint).resolve() == work / "nano" for config in first.values())
    assert {(config.mix, config.seed) for config in first.values()} == {
        (mix, seed) for mix in ("gate", "sum", "hidden") for seed in range(3)
    }
    fewer = {Path(name).parts[1]: c for name, c in configs.items() if name.startswith("amount")}
    assert set(fewer) == {"share-75", "share-50", "share-25", "single"}
    assert all((c.stage, c.steps, c.epochs) == ("2", None, 1) for c in fewer.values())
    assert all(Path(c.checkpoint).resolve() == work / "nano" for c in fewer.values())
    assert len([call for call in calls if call[0] == "hidden"]) == 1 + len(fewer)
    assert configs["before/full/1b-offline"].steps == configs["before/full/1b"].steps
    rows = {row for call in calls for row in options(call, "--row")}
    assert {row.partition("/")[0] for row in rows} == {"table2", "table3", "table4", "table5"}
    assert {call[0] for call in run()} == {"evaluate"}

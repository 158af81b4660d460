"""The installed package: what the wheel holds, and all commands in an empty directory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import xla
from tests.support.paths import AUDIO, DECODER, EXAMPLES, GOLDENS, ROOT

# The installed script several times in one process: to start one takes longer than most commands.
COMMANDS = """
import json, runpy, sys
script, commands = sys.argv[1], json.loads(sys.argv[2])
for arguments in commands:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
MAX_BYTES = 40e6  # of the package, which is mostly the embedded model
SOURCES = ("omni2_jax", "convert", "train", "configs")


def modules(folder: Path) -> set[str]:
    """The Python files below a folder, links followed."""
    found = (
        Path(path, name).relative_to(folder)
        for path, _, names in os.walk(folder, followlinks=True)
        for name in names
    )
    return {str(path) for path in found if path.suffix == ".py"}


def checked(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory, new_checkpoint) -> Path:
    """The folder that the package is installed into: sources -> sdist -> wheel -> folder.

    Where the sources hold no embedded model, a tiny one is put in its place.
    """
    work = tmp_path_factory.mktemp("wheel")
    source, target = work / "source", work / "site-packages"
    source.mkdir()
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    nano = source / "omni2_jax" / "nano"
    if not (nano / "config.json").exists():
        shutil.copytree(new_checkpoint, nano, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    checked([sys.executable, "-c", build, work], source)
    (sdist,) = work.glob("*.tar.gz")
    assert sdist.stat().st_size < MAX_BYTES
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    checked([*pip, "--target", target, sdist], work)
    return target


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_every_module(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"omni2_jax", "bin"}
    assert modules(installed / "omni2_jax") == modules(ROOT / "omni2_jax")
    assert (installed / "omni2_jax" / "py.typed").is_file()
    page = Path("omni2_jax", "serve", "page")
    names = {path.name for path in (ROOT / page).iterdir()}
    assert "index.html" in names and names == {path.name for path in (installed / page).iterdir()}


@pytest.mark.slow
def test_the_embedded_model_is_whole(omni2):
    assert "sound" in omni2(["info", "--verify"])


@pytest.mark.parametrize("name", ["convert", "train"])
def test_modules_of_a_checkout_are_commands(name):
    done = checked([sys.executable, "-m", name, "--help"], ROOT)
    assert done.stdout.startswith(f"Usage: omni2 {name} ")


@pytest.fixture(scope="module")
def omni2(installed, tmp_path_factory) -> Callable[..., str]:
    """Run installed commands in an empty directory: (*arguments of each) -> what they print."""
    directory = tmp_path_factory.mktemp("empty")
    variables = {"PYTHONPATH": str(installed), "XLA_FLAGS": xla.flags(1)}
    code = "import omni2_jax.train.settings as module; print(module.__file__)"
    loaded = checked([sys.executable, "-c", code], directory, **variables).stdout.strip()
    assert Path(loaded).is_relative_to(installed)

    def run(*commands: list[object]) -> str:
        words = json.dumps([list(map(str, command)) for command in commands])
        program = [sys.executable, "-c", COMMANDS, installed / "bin" / "omni2", words]
        return checked(program, directory, **variables).stdout

    return run


def write_dialogues(folder: Path) -> None:
    """The first dialogue of the examples, with made-up units for its reply."""
    spoken = EXAMPLES / "training"
    dialogue = json.loads((spoken / "data.jsonl").read_text().splitlines()[0])
    for turn in dialogue["turns"]:
        turn["audio"] = str(spoken / turn["audio"])
        if turn["role"] == "assistant":
            turn["units"] = list(range(35))
    (folder / "data.jsonl").write_text(json.dumps(dialogue) + "\n")


@pytest.mark.slow
def test_all_commands_in_an_empty_directory(omni2, tmp_path):
    """The answer is text alone, which is compiled in a quarter of the time that sound takes."""
    release = ["--omni2", GOLDENS / "omni2", "--decoder", DECODER]
    write_dialogues(tmp_path)
    settings = {
        "checkpoint": "tiny",
        "data": "dialogues",
        "dtype": "float32",
        "batch": 1,
        "steps": 1,
        "workers": 1,
        "optimizer.warmup": 0,
    }
    changes = [f"--set={key}={value}" for key, value in settings.items()]
    changes.append("--set=buckets=({'segments': 1, 'positions': 400, 'tokens': 64},)")
    stage, states = ["--config", "stage2", *changes], "--set=hidden=states"
    question = [AUDIO / "short_d.wav", "--text-only", "--max-new-tokens", 3]
    written = omni2(
        ["convert", *release, "--voice", f"espeak={EXAMPLES / 'voice.wav'}", "--out", "tiny"],
        ["info", "tiny"],
        ["prepare", "--source", tmp_path, "--out", "dialogues"],
        ["hidden", *stage, "--out", "states"],
        ["train", *stage, states, "--out", "run"],
        ["chat", "--checkpoint", "run/final", *question],
        ["convert", "--to-torch", "run/final", "--out", "release"],
    )
    assert "voices: espeak" in written

"""The command line itself: usage errors, missing extras, the version, and a start without JAX."""

import importlib.util
import os
import subprocess
import sys

import pytest

from omni2_jax import __version__, console
from tests.support.commands import is_error_line

HEAVY = ("jax", "flax", "numpy", "transformers", "torch")


def process(*args: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "omni2_jax", *args],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )


def test_the_command_is_imported_without_jax():
    code = f"import sys, omni2_jax.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_help_without_arguments_and_of_every_subcommand(omni2):
    code, out, _ = omni2()
    assert code == 0 and out.startswith("Usage: omni2 [OPTIONS] COMMAND")
    for name in ("chat", "convert", "prepare", "train", "hidden", "info"):
        assert f"\n  {name} " in out
        code, help, _ = omni2(name, "--help")
        assert code == 0 and help.startswith(f"Usage: omni2 {name} ")


def test_version(omni2):
    assert omni2("--version") == (0, f"omni2-jax {__version__}\n", "")


MISUSE = {
    ("nothing",): "No such command 'nothing'.",
    ("--colour",): "No such option: --colour",
    ("prepare",): "Missing option '--source'.",
    ("train", "--config", "stage1a"): "Missing option '--out'.",
    ("prepare", "--source", "x", "--out", "y", "--batch", "many"): "Invalid value for '--batch'",
    ("prepare", "--source", "x", "--out", "y", "--batch", "0"): "Invalid value for '--batch'",
    ("prepare", "--source", "x", "--out", "y", "--shard", "2/2"): "Invalid value for '--shard'",
}


@pytest.mark.parametrize("arguments", MISUSE, ids=" ".join)
def test_misuse_is_one_line(omni2, arguments):
    line, out, err = omni2(*arguments)
    assert is_error_line(line) and out == err == ""
    assert line.startswith(f"error: {MISUSE[arguments]}")


def test_exit_code_and_stream_of_an_error():
    done = process("prepare")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Missing option '--source'.\n"


def test_traceback_on_request():
    done = process("info", "no/checkpoint", OMNI2_TRACEBACK="1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "no/checkpoint is not an omni2-jax checkpoint" in done.stderr.splitlines()[-1]


def run(error: BaseException) -> object:
    """What the process exits with if a command raises `error`."""

    def command() -> None:
        raise error

    app = console.new_app()
    app.command()(command)
    with pytest.raises(SystemExit) as exit:
        console.run(app, [])
    return exit.value.code


@pytest.mark.parametrize(("extra", "modules"), console.EXTRAS.items(), ids=list(console.EXTRAS))
def test_a_missing_extra_is_named(extra, modules):
    for module in modules:
        error = ModuleNotFoundError(f"No module named '{module}.x'", name=f"{module}.x")
        assert run(error) == (
            f"error: {module} is not installed; install it with: pip install 'omni2-jax[{extra}]'"
        )


def test_extras_are_those_of_the_package():
    """Every module that `EXTRAS` names is one that the extra installs, and is installed here."""
    for modules in console.EXTRAS.values():
        for module in modules:
            if module == "torch":
                pytest.importorskip(module)
            elif module == "sounddevice":  # to import it, PortAudio is needed, too
                assert importlib.util.find_spec(module)
            else:
                __import__(module)


def test_failures_and_defects():
    assert run(ValueError("a\n  b")) == "error: a b"
    assert run(OSError(28, "No space left on device", "x")).endswith("No space left on device: 'x'")
    assert run(KeyboardInterrupt()) == 130
    for defect in (ModuleNotFoundError("No module named 'x'", name="x"), KeyError("x")):
        with pytest.raises(type(defect)):
            run(defect)


def test_notes_are_printed_as_they_are(capsys, monkeypatch):
    """Names may hold what rich would read as markup; long lines are not wrapped."""
    monkeypatch.setattr(console.console, "_file", sys.stderr, raising=False)
    name = "[/]x[bold].wav " + 50 * "long "
    console.say(name)
    assert capsys.readouterr().err == name + "\n"

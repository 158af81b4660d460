"""Two processes of two devices hold one model: its answers and files are those of one process."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.train.loop import Run
from tests.support import xla
from tests.support.commands import chat, process
from tests.support.compare import tree_equal
from tests.support.conversations import GREEDY, SHORT, clip, conversation
from tests.support.paths import ROOT
from tests.support.releases import linked
from tests.support.runs import losses, prepared, toy_run

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def together(
    jobs: str, checkpoint_dir: Path, out: Path, processes: int = 2, seconds: float = 300
) -> None:
    """Run jobs of tests/support/worker.py in several processes; all are ended if one fails."""
    env, port = os.environ | {"XLA_FLAGS": xla.flags(2)}, free_port()
    logs = [out / f"{index}.log" for index in range(processes)]
    running = []
    for index, log in enumerate(logs):
        command = [
            sys.executable,
            "-m",
            "tests.support.worker",
            jobs,
            port,
            processes,
            index,
            checkpoint_dir,
            out,
        ]
        with open(log, "w") as file:
            running.append(
                subprocess.Popen(
                    list(map(str, command)), cwd=ROOT, env=env, stdout=file, stderr=file
                )
            )
    try:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in running), "\n".join(
        log.read_text()[-3000:] for log in logs
    )


@pytest.fixture(scope="module")
def out(checkpoint_dir, tmp_path_factory) -> Path:
    """The directory that two processes have written to."""
    out = tmp_path_factory.mktemp("processes")
    (out / "talks").mkdir()
    prepared(out / "talks", ("sea", "tea"))
    together("answer,save,train", checkpoint_dir, out)
    return out


def test_answers(out, text_model):
    options = dataclasses.replace(GREEDY, **SHORT)
    for index in range(2):
        for name, output in json.loads((out / f"{index}.json").read_text()).items():
            answer = text_model.answer(conversation(name), options=options)
            assert output == [answer.text, answer.units]


def restored(directory: Path, config: Omni2Config) -> dict:
    return parameters.load(directory, config, jnp.float32)[1]


def test_saved_by_two_restored_by_one(out, checkpoint_dir):
    config = Omni2Config.load(checkpoint_dir / "config.json").only("llm")
    assert (out / "params" / "llm" / "ocdbt.process_1").is_dir()
    assert tree_equal(restored(out, config), restored(checkpoint_dir, config))


def test_run_of_two_processes_resumed_by_one(out, checkpoint_dir, tmp_path):
    """Losses are those of one device, also after one process resumes a state that two have saved.

    The exported checkpoint is complete.
    """
    settings = toy_run(checkpoint_dir, out / "talks" / "data")
    Run(settings, tmp_path / "alone", jax.devices()[:1]).go()
    np.testing.assert_allclose(losses(out / "run"), losses(tmp_path / "alone"), rtol=0, atol=1e-4)
    for path in ("params/speech_lm", "params/llm"):
        assert (out / "run" / "final" / path / "_METADATA").exists()
    shutil.copytree(out / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "steps" / "4")
    Run(settings, tmp_path / "run", jax.devices()[:1]).go()
    np.testing.assert_allclose(
        losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=0, atol=1e-4
    )


def test_shards_of_one_process_are_missing(out, checkpoint_dir, tmp_path):
    """The error is one line that names the part, on eight devices that read it at the same time."""
    damaged = linked(checkpoint_dir, tmp_path / "damaged")
    shutil.rmtree(damaged / "params" / "llm")
    shutil.copytree(out / "params" / "llm", damaged / "params" / "llm")
    shutil.rmtree(damaged / "params" / "llm" / "ocdbt.process_1")
    done = process(*chat(damaged, clip("short_d"), "--no-wav", "--mesh", "fsdp=8"))
    assert done.returncode == 1 and done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"error: {damaged}/params/llm is damaged: its parameter ")

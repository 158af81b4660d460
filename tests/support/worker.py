"""A process of tests/test_processes.py.

python -m tests.support.worker JOBS PORT PROCESSES INDEX CKPT OUT
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.sharding import make_mesh
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import MeshConfig
from tests.support.conversations import GREEDY, SHORT, conversation
from tests.support.runs import toy_run


def answer(ckpt: Path, out: Path) -> None:
    """Write the answers of a model that is sharded over the processes to INDEX.json."""
    model = Omni2.load(ckpt, dtype=jnp.float32, decoder=False, mesh=make_mesh(fsdp=2, tensor=2))
    options = dataclasses.replace(GREEDY, **SHORT)
    answers = {name: model.answer(conversation(name), options=options) for name in "BE"}
    (out / f"{jax.process_index()}.json").write_text(
        json.dumps({name: [answer.text, answer.units] for name, answer in answers.items()})
    )


def save(ckpt: Path, out: Path) -> None:
    """Restore the LLM into shards, and save it from them."""
    config = Omni2Config.load(ckpt / "config.json").only("llm")
    _, params = parameters.load(ckpt, config, jnp.float32, make_mesh(fsdp=2, tensor=2))
    assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
    parameters.save_part(out, "llm", params["llm"])


def train(ckpt: Path, out: Path) -> None:
    """Train a few steps of stage 1b on OUT/talks into OUT/run; every process reads its rows."""
    Run(toy_run(ckpt, out / "talks" / "data", mesh=MeshConfig(1, 2, 2)), out / "run").go()


def main(jobs: str, port: str, processes: str, index: str, ckpt: str, out: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
    for job in jobs.split(","):
        {"answer": answer, "save": save, "train": train}[job](Path(ckpt), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

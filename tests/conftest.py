"""What all tests share: a compilation cache, the tiny release converted once, and warm engines."""

import atexit
import dataclasses
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support import xla

# JAX reads these variables when it is imported, below. Processes that the tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla.flags(8)  # for meshes
# XLA's number of threads, 8 by default. In a collective, one thread for each device waits for the
# others, and with few threads one of those may never get to run.
os.environ.setdefault("NPROC", "32")
# Set JAX_COMPILATION_CACHE_DIR to keep what was compiled for the next run. The workers of
# pytest-xdist share it: most programs are compiled by one of them only. JAX does not write entries
# atomically, but an entry is compressed: half of one is refused, and the program compiled again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="omni2-jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from omni2_jax.cli.main import main
from omni2_jax.configs import stage1b
from omni2_jax.convert import new, read, write
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.release import Release, combine
from omni2_jax.generate import omni2 as omni2_module
from omni2_jax.generate.engine import Engine
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.train.settings import TrainConfig
from tests.support import designs
from tests.support.conversations import GREEDY
from tests.support.networks import draw_tokenizer
from tests.support.paths import DECODER, GOLDENS, ROOT
from tests.support.releases import convert
from tests.support.runs import prepared, toy_config

# Without torch, which reads the goldens' weights, the other tests can still run.
if importlib.util.find_spec("torch") is None:
    collect_ignore = [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if "\nimport torch\n" in path.read_text()
    ]

# Tracing makes many objects, and a fifth of its time is Python's search for unreachable ones among
# all that were imported.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# All conversations of the tests get buffers of one size: compilation is most of the tests' time.
omni2_module.BUCKET = 1280


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A nightly test is slow. Files with slow tests come first.

    `pytest -n 2 --dist loadfile --no-loadscope-reorder` keeps this order: at the end, when one
    worker has nothing left to do, the other one has a quick file.
    """
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory) -> Path:
    """The tiny release, with the decoder and one voice, as a checkpoint."""
    out = tmp_path_factory.mktemp("tiny") / "ckpt"
    if "OMNI2_TINY_CHECKPOINT" in os.environ:  # made by another Python, for one without torch
        return shutil.copytree(os.environ["OMNI2_TINY_CHECKPOINT"], out)
    pytest.importorskip("torch")
    release = combine([read.read_omni2(GOLDENS / "omni2"), read.read_decoder(DECODER)])
    # An x-vector that is known. That of a recording takes 5 s.
    np.save(out.with_name("voice.npy"), np.load(DECODER / "flow.npz")["embedding"])
    write.write(out, release, {"espeak": out.with_name("voice.npy")})
    return out


@pytest.fixture(scope="session")
def new_checkpoint(tmp_path_factory) -> Path:
    """What `omni2 new` makes of the tiny design: all parts, 80 mel bins, a window of 2 s."""
    folder = tmp_path_factory.mktemp("new")
    design, text = designs.write(folder)
    out = folder / "ckpt"
    made = new.make(new.Design.read(str(design)), Release(EMPTY_CONFIG), text=text)
    write.write(out, made, {})
    return out


@pytest.fixture(scope="session")
def speech_tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("units") / "s3.safetensors"
    save_file(draw_tokenizer(), path)
    return path


@pytest.fixture(scope="session")
def speech_tokenizer_dir(speech_tokenizer_file) -> Path:
    """A checkpoint that holds only the speech tokenizer of the goldens."""
    out = speech_tokenizer_file.with_name("ckpt")
    assert convert("--speech-tokenizer", speech_tokenizer_file, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def talks(tmp_path_factory) -> Path:
    """Two dialogues, one of one turn and one of two."""
    return prepared(tmp_path_factory.mktemp("talks"), ("sea", "tea"))


@pytest.fixture(scope="session")
def toy(checkpoint_dir, talks) -> Callable[..., TrainConfig]:
    """Settings of a toy run: (config, **changes). Stage 1b, the default, is quick to compile."""

    def toy(config: TrainConfig = stage1b.config, **changes) -> TrainConfig:
        return toy_config(config, checkpoint_dir, talks, **changes)

    return toy


@pytest.fixture
def arguments(toy) -> Callable[..., list[str]]:
    """The arguments of `omni2 train` for a toy run of stage 1b: (out, **changes)."""

    def arguments(out: Path, **changes) -> list[str]:
        default, values = dataclasses.asdict(stage1b.config), dataclasses.asdict(toy(**changes))
        sets = [f"--set={key}={value}" for key, value in values.items() if value != default[key]]
        return ["--config", str(ROOT / "configs" / "stage1b.py"), "--out", str(out), *sets]

    return arguments


@pytest.fixture
def omni2(monkeypatch, capsys) -> Callable[..., tuple[int | str, str, str]]:
    """Run `omni2` in this process -> (exit code or the line of its error, stdout, stderr).

    A process of its own (tests.support.commands.process) takes seconds to import everything.
    """

    def run(*args: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["omni2", *map(str, args)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def encoded() -> dict[bytes, jax.Array]:
    """What the tiny release has heard: the samples of each recording -> its features."""
    return {}


def encoding_once(model: Omni2, encoded: dict[bytes, jax.Array]) -> Omni2:
    """The model, which looks up recordings that it has heard: 0.3 s of computing each."""
    encode = model.encode

    def look_up(clip: np.ndarray) -> jax.Array:
        key = np.asarray(clip, np.float32).tobytes()
        if key not in encoded:
            (encoded[key],) = encode([clip])
        return encoded[key]

    model.encode = lambda clips: [look_up(clip) for clip in clips]
    return model


@pytest.fixture(scope="session")
def model(checkpoint_dir, encoded) -> Omni2:
    return encoding_once(Omni2.load(checkpoint_dir, dtype=jnp.float32), encoded)


@pytest.fixture(scope="session")
def text_model(checkpoint_dir, encoded) -> Omni2:
    """The same model without the decoder, which takes most of the time to compile."""
    model = Omni2.load(checkpoint_dir, dtype=jnp.float32, decoder=False)
    return encoding_once(model, encoded)


def warm(model: Omni2) -> Engine:
    engine = model.engine(GREEDY, 1000, slots=3)
    engine.warm_up()
    return engine


@pytest.fixture(scope="session")
def warm_engine(model) -> Engine:
    return warm(model)


@pytest.fixture(scope="session")
def warm_text_engine(text_model) -> Engine:
    return warm(text_model)


@pytest.fixture
def engine(warm_engine):
    """A warm engine of three slots. A test must leave it idle, and compile nothing."""
    yield from left_idle(warm_engine)


@pytest.fixture
def text_engine(warm_text_engine):
    """The same for text and units only."""
    yield from left_idle(warm_text_engine)


def left_idle(engine: Engine):
    compiled = engine.compilations()
    yield engine
    assert not any(engine.slots) and not engine.waiting
    assert engine.compilations() == compiled

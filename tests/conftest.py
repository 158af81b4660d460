"""What all tests share: one compilation cache, the goldens, and the tiny release converted once."""

import os
import tempfile
from pathlib import Path

# Before jax is imported, and inherited by the command lines that the tests run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="omni2-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax.numpy as jnp
import pytest

from convert import build
from omni2_jax.omni2 import Omni2

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory) -> Path:
    """The tiny release, language side and decoder, as a checkpoint with one voice."""
    out = tmp_path_factory.mktemp("tiny") / "ckpt"
    release = build.combine([build.read_omni2(GOLDENS / "omni2"), build.read_decoder(GOLDENS / "cosy2_decoder")])
    build.write(out, release, {"espeak": ROOT / "examples" / "voice.wav"})
    return out


@pytest.fixture(scope="session")
def model(checkpoint_dir) -> Omni2:
    return Omni2.load(checkpoint_dir, dtype=jnp.float32)

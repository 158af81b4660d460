"""A conversion holds about its largest parameter in memory, not the model.

benchmarks/convert_memory.py measures it at the released sizes.
"""

import dataclasses
import weakref

import numpy as np
import pytest

from benchmarks.convert_memory import measure
from omni2_jax.checkpoint import lazy, parameters
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config, TokenConfig
from omni2_jax.convert import read
from tests.support.paths import GOLDENS

pytestmark = pytest.mark.slow


def test_one_large_parameter_or_a_few_small_ones_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 2**16)
    release, alive, most = read.read_omni2(GOLDENS / "omni2"), {}, []

    def watched(leaf):
        def read():
            value = leaf.read()
            alive[id(value)] = value.nbytes
            weakref.finalize(value, alive.pop, id(value))
            most.append(sum(alive.values()))
            return value

        return dataclasses.replace(leaf, read=read)

    for part, params in release.params.items():
        leaves = {path: watched(leaf) for path, leaf in parameters.flatten(params).items()}
        parameters.save_part(tmp_path, part, leaves)
        assert max(most) <= max(2**16, *(leaf.nbytes for leaf in leaves.values()))
        most.clear()
    assert not alive


@pytest.mark.parametrize(
    "shape", [(158227, 896), (64, 5120, 27648), (24, 896, 2, 64), (7, 3), (5,), ()]
)
def test_chunks(shape):
    """They have 8 MB at most, and half of that at least where the array allows.

    The tokens of the speech LM are a prime number.
    """
    chunk = lazy.chunk_shape(shape, 2)
    size = 2 * int(np.prod(chunk))
    assert len(chunk) == len(shape) and size <= lazy.CHUNK_BYTES
    assert 2 * size > min(lazy.CHUNK_BYTES, 2 * int(np.prod(shape)))


@pytest.mark.nightly  # the first test of this file counts the bytes of the arrays that are alive
def test_peak_of_a_conversion():
    """Six layers of everything at the 0.5B release's widths, in a process of its own."""
    config = Omni2Config().only(*LANGUAGE_PARTS)
    few = {
        part: dataclasses.replace(getattr(config, part), layers=6)
        for part in ("speech_encoder", "llm", "speech_lm")
    }
    few |= {part: dataclasses.replace(few[part], vocabulary=32000) for part in ("llm", "speech_lm")}
    found = measure(config.replace(**few, tokens=TokenConfig(1, (2,), 1, 2)))
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()})
    assert found["all"] > 700e6 and found["largest"] < 80e6
    assert found["peak"] - found["before"] < found["all"] / 2

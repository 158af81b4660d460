"""The read/write layout of replies, written by hand.

R = 3 text tokens, W = 4 units; unit u is the token 101 + u, <sep> is 100 and eos 99.
"""

import pytest

from omni2_jax.config import Omni2Config, TokenConfig
from omni2_jax.train.layout import arrange
from omni2_jax.train.losses import IGNORE

CONFIG = Omni2Config(read=3, write=4, tokens=TokenConfig(sep=100, unit_eos=99))
__ = IGNORE

CASES = {
    # The last group is full; <sep> and all other units follow it.
    "text a multiple of R": (
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]),
        [1, 2, 3, 101, 102, 103, 104, 4, 5, 6, 100, 105, 106],
        [__, __, 101, 102, 103, 104, __, __, __, __, 105, 106, 99],
        [0, 1, 2, -1, -1, -1, -1, 3, 4, 5, -1, -1, -1],
    ),
    "text shorter than R, units shorter than W": (
        ([1, 2], [7, 8]),
        [1, 2, 100, 108, 109],
        [__, __, 108, 109, 99],
        [0, 1, -1, -1, -1],
    ),
    # After <sep> all units follow; the last eos is a target only.
    "more units than a write holds": (
        ([1], [0, 1, 2, 3, 4, 5]),
        [1, 100, 101, 102, 103, 104, 105, 106],
        [__, 101, 102, 103, 104, 105, 106, 99],
        [0, -1, -1, -1, -1, -1, -1, -1],
    ),
    # As in generation: a write that ends early ends with eos, which stays in the context, and every
    # later write is one eos.
    "units run out before the text": (
        ([1, 2, 3, 4, 5, 6, 7], [7, 8]),
        [1, 2, 3, 108, 109, 99, 4, 5, 6, 99, 7, 100],
        [__, __, 108, 109, 99, __, __, __, 99, __, __, 99],
        [0, 1, 2, -1, -1, -1, 3, 4, 5, -1, 6, -1],
    ),
    "a write that is just full": (
        ([1, 2, 3, 4], [0, 1, 2, 3]),
        [1, 2, 3, 101, 102, 103, 104, 4, 100],
        [__, __, 101, 102, 103, 104, __, __, 99],
        [0, 1, 2, -1, -1, -1, -1, 3, -1],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_read_write(case):
    arguments, tokens, targets, source = CASES[case]
    layout = arrange(*arguments, CONFIG)
    assert layout.tokens.tolist() == tokens
    assert layout.targets.tolist() == targets
    assert layout.source.tolist() == source


def test_offline():
    """All of the text, <sep>, all of the units."""
    layout = arrange([1, 2, 3, 4], [5, 6, 7, 8, 9], CONFIG, offline=True)
    assert layout.tokens.tolist() == [1, 2, 3, 4, 100, 106, 107, 108, 109, 110]
    assert layout.targets.tolist() == [__, __, __, __, 106, 107, 108, 109, 110, 99]
    assert layout.source.tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1, -1]

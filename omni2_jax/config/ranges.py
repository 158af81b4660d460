"""The ranges of settings, and the checks of settings that depend on one another.

The upper bounds lie far above any published model; they keep a damaged file from asking for all
memory.
"""

from typing import Annotated

import pydantic
from pydantic import Field

STRICT = pydantic.ConfigDict(extra="forbid")  # unknown names are errors: a typo, another program

Size = Annotated[int, Field(ge=1, le=1 << 18)]  # widths, channels, kernels
Count = Annotated[int, Field(ge=1, le=1000)]  # layers, heads
Vocabulary = Annotated[int, Field(ge=1, le=10_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=10_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Theta = Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False)]  # base of rotary positions
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16)]
Dilations = Annotated[tuple[Sizes, ...], Field(min_length=1, max_length=16)]


def require(fits: object, message: str) -> None:
    """Raise ValueError with `message` unless `fits`."""
    if not fits:
        raise ValueError(message)


def check_heads(heads: int, width: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    require(width % heads == 0, f"{heads} heads do not divide the width of {width}")


def check_lengths(config: object, first: str, *others: str) -> None:
    """Raise ValueError unless these fields of a configuration have as many entries as the first."""
    count = len(getattr(config, first))
    for name in others:
        length = len(getattr(config, name))
        require(
            length == count,
            f"{name} has {length} entries, expected {count}, as {first} has",
        )


def check_equal(name: str, value: int, other: str, expected: int) -> None:
    """Raise ValueError unless two settings that two parts share are equal."""
    require(value == expected, f"{name} is {value}, expected {expected}, as {other} is")

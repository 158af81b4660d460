"""The options of an answer, with their defaults and the range of each."""

import numbers
from dataclasses import dataclass
from typing import Literal

from omni2_jax.generate.engine_config import CACHE_DTYPES

# The smallest and the largest value of every number; an option with integers as bounds takes
# integers only. Buffers are made for the longest possible answer, and JAX computes with 32-bit
# integers: the upper bounds keep both within reason.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.01, 100.0),
    "max_new_tokens": (1, 8192),
    "unit_temperature": (0.0, 100.0),
    "unit_top_k": (0, 1_000_000),
    "max_flush_units": (1, 16_384),
    "seed": (0, 2**32 - 1),
    "chunk": (1, 1000),
    "left_chunks": (0, 1000),
}
# What the checkpoint's generation_config.json decides if it is None.
SAMPLING = ("top_p", "top_k", "repetition_penalty", "unit_temperature", "unit_top_k")
OPTIONAL = (*SAMPLING, "chunk", "left_chunks")  # may be None
UNIT_TEMPERATURE = 1.0  # the paper's
UNIT_TOP_K = 50  # the released code's
CHOICES: dict[str, tuple[object, ...]] = {
    "unit_vocabulary": ("units", "all"),
    "flow_cache_dtype": CACHE_DTYPES,
    "seamless": (True, False),
    "long_turns": ("refuse", "truncate", "split"),
}


@dataclass(frozen=True)
class Options:
    """How to generate an answer. Raises ValueError for a value outside its range.

    Where one of SAMPLING is None, the checkpoint's generation_config.json decides. Without an entry
    there, the text is sampled among all tokens, and units with UNIT_TEMPERATURE and UNIT_TOP_K.
    """

    temperature: float = 0.0  # of the text; 0 = greedy
    top_p: float | None = None  # sample among the most likely text tokens of this probability
    top_k: int | None = None  # sample among this many text tokens; 0 = off
    repetition_penalty: float | None = None  # above 1: repeated text tokens become less likely
    max_new_tokens: int = 256  # text tokens at most
    unit_temperature: float | None = None  # 0 = greedy, which tends to repeat itself
    unit_top_k: int | None = None
    # "units": only units can be sampled. "all": any token of the speech LM, as released.
    unit_vocabulary: str = "units"
    max_flush_units: int = 1024  # speech tokens at most after the end of the text
    seed: int = 0  # the same seed gives the same answer
    chunk: int | None = None  # units in a flow chunk; None = the checkpoint's (50)
    # Flow chunks that the flow sees before its own. None = all, as in the released code; that takes
    # 9 MB of memory for every unit at real size, on a GPU 4.6 MB.
    left_chunks: int | None = 4
    # float32, or bfloat16, which halves the memory of the flow's KV cache. On a GPU nearly all of
    # that cache is always bfloat16; see `EngineConfig`.
    flow_cache_dtype: str = "float32"
    # Join the waveforms of two steps without the small jumps that the released code makes.
    seamless: bool = True
    long_turns: Literal["refuse", "truncate", "split"] = "refuse"  # of more than a segment

    def __post_init__(self):
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                check_number(name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = " or ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless the value of an option is a number within its limits."""
    low, high = LIMITS[name]
    kind = numbers.Integral if isinstance(low, int) else numbers.Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    # A comparison with NaN is False.
    if not is_number or not low <= value <= high:  # pyright: ignore[reportOperatorIssue]
        article = "an integer" if isinstance(low, int) else "a number"
        raise ValueError(f"{name} is {value!r}, expected {article} from {low} to {high}")

"""What a training run is told: one typed dataclass, given by a configs/*.py file and changed by `--set key=value`."""

import ast
import dataclasses
import difflib
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pydantic

SHIPPED = Path(__file__).parents[1] / "configs"
FORBID = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Bucket:
    """The shape of a batch's rows. An example goes into the first bucket that holds it; what a stage does not have takes no room."""

    clips: int = 1  # 30 s of question
    positions: int = 0  # of the LLM
    tokens: int = 0  # of the speech LM in a reply; for the flow, units


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after a linear warm-up, along a cosine (paper section 4.1; decay, betas and clipping are not stated there)."""

    peak: float = 5e-5
    warmup: float = 0.03  # share of all steps
    final: float = 0.0  # share of the peak at the end
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # of matrices
    clip: float = 1.0  # norm of all gradients together
    ema: float | None = (
        None  # keep an exponential average of the weights, which is then what is validated and exported
    )

    def __post_init__(self):
        shares = {
            name: getattr(self, name) or 0 for name in ("warmup", "final", "beta1", "beta2", "ema")
        }
        faults = [
            f"{name} is {value}, expected 0 to 1"
            for name, value in shares.items()
            if not 0 <= value <= 1
        ]
        above = {name: getattr(self, name) for name in ("peak", "eps", "clip")}
        faults += [
            f"{name} is {value}, expected more than 0"
            for name, value in above.items()
            if not value > 0
        ]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1, the rest."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    __pydantic_config__ = FORBID

    stage: Literal["1a", "1b", "2", "flow"]
    checkpoint: str = ""  # what to start from, made by python -m convert or by an earlier stage
    data: str = ""  # made by python -m train.prepare
    validation: str | None = None  # another such dataset
    batch: int = 32
    microbatches: int = 1  # a batch is computed in so many parts, one after the other
    epochs: float = 1.0
    steps: int | None = None  # instead of epochs
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    buckets: tuple[Bucket, ...] = (Bucket(),)
    # What is trained
    rank: int = 0  # stage 1a: train low-rank updates of this rank instead of the LLM (LoRA)
    layout: Literal["read_write", "offline"] = (
        "read_write"  # offline: all of the text before the first unit (table 4)
    )
    mix: Literal["gate", "sum", "hidden"] = (
        "gate"  # stage 2: the paper's ablations of gate fusion (table 2)
    )
    hidden: str | None = (
        None  # stage 2: the LLM's hidden states, computed once by python -m train.hidden
    )
    reset: tuple[
        str, ...
    ] = ()  # parts to begin anew instead of from the checkpoint (table 3, "scratch")
    chunks: tuple[
        int, ...
    ] = ()  # flow: chunk sizes drawn at random, 0 = the whole; none = the checkpoint's
    # How it is computed
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: Literal["bfloat16", "float32"] = (
        "bfloat16"  # of the computation; weights being trained are float32
    )
    remat: Literal["none", "dots", "full"] = "full"
    loss_block: int = 256  # positions whose logits exist at once
    workers: int = 4  # threads that read examples
    strict: bool = False  # stop at a damaged record instead of leaving it out
    # What is kept and shown
    save_every: int = 500
    keep: int = 2
    validate_every: int = 500
    samples: int = 2  # dialogues of the validation set that are answered at each validation
    max_sample_text: int = 100  # text tokens of such an answer
    profile: tuple[int, int] | None = None  # first and last step to trace with the JAX profiler
    peak_flops: float | None = None  # of a device, where it is not known by name; for MFU

    def __post_init__(self):
        least = dict.fromkeys(("seed", "rank", "samples"), 0) | dict.fromkeys(
            (
                "batch",
                "microbatches",
                "loss_block",
                "workers",
                "save_every",
                "keep",
                "validate_every",
                "max_sample_text",
            ),
            1,
        )
        faults = [
            f"{name} is {getattr(self, name)}, expected at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.batch % max(self.microbatches, 1):
            faults.append(f"batch {self.batch} cannot be cut into {self.microbatches} microbatches")
        if (self.steps is not None and self.steps < 1) or not self.epochs > 0:
            faults.append("steps and epochs must be positive")
        if not self.buckets:
            faults.append("buckets is empty; at least one is needed")
        if self.rank and self.stage != "1a":
            faults.append("rank is for stage 1a; the other stages train no LLM")
        if self.hidden and self.stage != "2":
            faults.append("hidden is for stage 2; no other stage reads the LLM's hidden states")
        if self.profile and not 0 <= self.profile[0] <= self.profile[1]:
            faults.append(f"profile is {self.profile}, expected a first and a last step")
        if faults:
            raise ValueError("; ".join(faults))


# What may differ when a run is taken up again: it changes speed, memory or reports, not the result.
MUTABLE_SETTINGS = {
    "mesh",
    "remat",
    "loss_block",
    "workers",
    "strict",
    "save_every",
    "keep",
    "validation",
    "validate_every",
    "samples",
}
MUTABLE_SETTINGS |= {"max_sample_text", "profile", "peak_flops"}


def read(source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """A training configuration with `key=value` changes.

    source: a Python file that defines `config`, or the name of a shipped one ("stage1a").
    Raises ValueError naming the file or the key, and what may have been meant.
    """
    path = config_file(source)
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # whatever somebody's file does
        raise ValueError(
            f"config {path}: {type(error).__name__}: {error}{mistyped(error)}"
        ) from None
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config {path} defines no `config` of type omni2_jax.train.settings.TrainConfig"
        )
    return changed(checked(dataclasses.asdict(config), f"config {path}"), changes)


def config_file(source: str | Path) -> Path:
    """The file of a configuration, given by path or by the name of a shipped one. Raises ValueError if there is none."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = {
        file.stem: file for file in SHIPPED.glob("*.py") if not file.stem.startswith(("_", "omni2"))
    }
    if str(source) in shipped:
        return shipped[str(source)]
    beside = map(str, path.parent.glob("*.py")) if path.parent.is_dir() else ()
    hint = nearest(str(source), sorted([*beside, *shipped]))
    raise ValueError(f"config {source} does not exist{hint}; shipped: {', '.join(sorted(shipped))}")


def changed(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """A configuration with `key=value` changes, `optimizer.peak=1e-4` reaching into it; values are read as the key's type."""
    tree = dataclasses.asdict(config)
    for change in changes:
        key, equals, text = change.partition("=")
        *path, last = key.strip().split(".")
        place = tree
        for name in path:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise ValueError(f"--set {change}: there is no {key!r}{nearest(key, list(flat(tree)))}")
        if not equals:
            raise ValueError(f"--set {change}: expected {key}=value")
        # What is a text stays one, as a directory named 2024.
        place[last] = text.strip() if isinstance(place[last], str) else literal(text.strip())
    return checked(tree, "--set " + " ".join(changes))


def checked(tree: dict, where: str) -> TrainConfig:
    """A configuration from a dictionary; every fault in one ValueError."""
    try:
        return pydantic.TypeAdapter(TrainConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        faults = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".removeprefix(
                ": "
            )
            for e in error.errors()
        ]
        raise ValueError(f"{where}: {'; '.join(faults)}") from None


def literal(text: str):
    """A Python literal, else the text itself."""
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def flat(tree: dict, before: str = "") -> dict[str, object]:
    """Nested dictionaries by their keys, dotted; the inner ones too."""
    found = {}
    for name, value in tree.items():
        found |= {before + name: value} | (
            flat(value, f"{before}{name}.") if isinstance(value, dict) else {}
        )
    return found


def mistyped(error: Exception) -> str:
    """A hint if one of the classes above was given a key that it does not have."""
    kinds = {kind.__name__: kind for kind in (Bucket, OptimizerConfig, MeshConfig, TrainConfig)}
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    return (
        nearest(found[2], [field.name for field in dataclasses.fields(kinds[found[1]])])
        if found and found[1] in kinds
        else ""
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for somebody who mistyped, or who left out what a key is within."""
    close = [key for key in known if key.endswith(f".{name}")] or difflib.get_close_matches(
        name, known, 1, 0.5
    )
    return f"; did you mean {close[0]}?" if close else ""

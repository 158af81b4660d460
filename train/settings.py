"""The settings of a training run: typed dataclasses that a config file constructs and `--set`
changes (see overrides.py).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from omni2_jax.train import stages

# Old name -> new name, of settings and of the classes that hold them. An old name is refused, with
# the new one as a hint.
RENAMED = {
    "optimiser": "optimizer",
    "loss_chunk": "loss_block",
    "Train": "TrainConfig",
    "Optimiser": "OptimizerConfig",
    "MeshShape": "MeshConfig",
}


def from_sequence(kind: type) -> pydantic.BeforeValidator:
    """Let a tuple stand for a dataclass, as (1, 66, 0) for a Bucket: its first fields in order."""
    names = [item.name for item in dataclasses.fields(kind)]

    def convert(value: object) -> object:
        if not isinstance(value, tuple | list):
            return value
        if len(value) > len(names):
            raise ValueError(f"{value} has {len(value)} values, expected {', '.join(names)}")
        return dict(zip(names, value, strict=False))

    return pydantic.BeforeValidator(convert)


def one_or_more(value: object) -> object:
    """Let one value stand for a tuple of one; a text may list several, separated by commas."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return (value,) if isinstance(value, int) else value


def one_or_more_buckets(value: object) -> object:
    """Let one bucket, written as a dict or as a tuple of integers, stand for a tuple of one."""
    is_sequence = isinstance(value, tuple | list)
    is_bucket = is_sequence and value and all(isinstance(item, int) for item in value)
    return (value,) if is_bucket or isinstance(value, dict) else value


@dataclass(frozen=True)
class Bucket:
    """The static shape of a batch's rows. An example goes into the first bucket that holds it.

    A size that a stage does not use is ignored.
    """

    segments: int = 1  # windows of the speech encoder (as released, 30 s of question each)
    positions: int = 0  # of the LLM
    # Of the speech LM for one reply; for the stages of the decoder speech units, 40 ms each.
    tokens: int = 0

    def __post_init__(self):
        faults = [
            f"{name} is {size}, expected at least 0"
            for name, size in dataclasses.asdict(self).items()
            if size < 0
        ]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def size(self) -> int:
        """Positions of the LLM and of the speech LM in a row, padding included."""
        return self.positions + max(self.segments, 1) * self.tokens


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay of the learning rate (paper section 4.1).

    The paper does not state weight decay, betas and clipping.
    """

    peak: float = 5e-5  # highest learning rate
    warmup: float = 0.03  # share of all steps
    final: float = 0.0  # last learning rate, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0  # weight decay of matrices
    clip: float = 1.0  # largest norm of all gradients together
    ema: float | None = None  # average the weights with this decay; the average is exported

    def __post_init__(self):
        shares = {
            name: getattr(self, name) or 0 for name in ("warmup", "final", "beta1", "beta2", "ema")
        }
        faults = [
            f"{name} is {value}, expected 0 to 1"
            for name, value in shares.items()
            if not 0 <= value <= 1
        ]
        positive = {name: getattr(self, name) for name in ("peak", "eps", "clip")}
        faults += [
            f"{name} is {value}, expected more than 0"
            for name, value in positive.items()
            if not value > 0
        ]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one size may be -1, all remaining devices."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class VocoderTraining:
    """The phases and the losses of stage "vocoder".

    First the F0 predictor alone, then the vocoder by its spectra and phases, in the end against
    discriminators as well. The weights of the losses are the reference's (CosyVoice2's hifigan.py),
    whose feature loss counts twice; it has no `stft` and no `harmonic_phases`.
    """

    segment: int = 50  # mel frames of a recording that a step vocodes: 1 s
    f0_steps: int = 0  # steps of the F0 predictor alone
    gan_from: int | None = None  # the first step with discriminators; None: they do not exist
    mel: float = 45.0
    stft: float = 22.5
    harmonic_phases: float = 0.0  # works best if the vocoder's random_phases are off
    f0: float = 1.0
    adversarial: float = 1.0
    features: float = 4.0
    relativistic: float = 1.0
    f0_peak: float = 1e-3  # highest learning rate of the F0 predictor
    discriminator_peak: float = 2e-4  # and of the discriminators
    # And of the vocoder and its F0 predictor from gan_from on, after another warm-up. None: their
    # rates go on as before.
    gan_peak: float | None = None
    width: int = 32  # channels of a discriminator's first layer
    periods: Annotated[tuple[int, ...], pydantic.BeforeValidator(one_or_more)] = (2, 3, 5, 7, 11)
    resolutions: Annotated[tuple[int, ...], pydantic.BeforeValidator(one_or_more)] = (
        512,
        1024,
        2048,
    )

    def __post_init__(self):
        smallest = {"segment": 1, "f0_steps": 0, "mel": 0, "stft": 0, "harmonic_phases": 0}
        smallest |= {"f0": 0, "adversarial": 0, "features": 0, "relativistic": 0, "width": 1}
        faults = [
            f"{name} is {getattr(self, name)}, expected at least {low}"
            for name, low in smallest.items()
            if getattr(self, name) < low
        ]
        faults += [
            f"{name} is {getattr(self, name)}, expected more than 0"
            for name in ("f0_peak", "discriminator_peak", "gan_peak")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if self.gan_from is not None and self.gan_from < self.f0_steps:
            faults.append(f"gan_from is {self.gan_from}, less than f0_steps, {self.f0_steps}")
        faults += [
            f"periods holds {size}, expected more than 0" for size in self.periods if size < 1
        ]
        faults += [
            f"resolutions holds {size}, expected a power of two from 16 on"
            for size in self.resolutions
            if size < 16 or size & (size - 1)
        ]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run. Raises ValueError, naming every setting that is out of range."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    stage: str  # a key of stages.STAGES
    checkpoint: str = ""  # to start from; of `omni2 convert` or an earlier stage
    data: str = ""  # a data set of `omni2 prepare`
    validation: str | None = None  # another data set of `omni2 prepare`
    batch: int = 32
    microbatches: int = 1  # parts of a batch, computed one after the other to save memory
    epochs: float = 1.0
    steps: int | None = None  # if given, it replaces `epochs`
    seed: int = 0
    optimizer: Annotated[OptimizerConfig, from_sequence(OptimizerConfig)] = field(
        default_factory=OptimizerConfig
    )
    buckets: Annotated[
        tuple[Annotated[Bucket, from_sequence(Bucket)], ...],
        pydantic.BeforeValidator(one_or_more_buckets),
    ] = (Bucket(),)
    # What is trained. Which stages use rank, layout, mix, hidden and chunks is stated by the
    # stages.
    rank: int = 0  # stage 1a: train low-rank updates (LoRA) of this rank instead of the LLM
    layout: Literal["read_write", "offline"] = "read_write"  # 1b and 2; offline: tables 3, 4
    # Stages 1b and 2: share of the units read that are random ones, for small data sets.
    unit_noise: float = 0.0
    mix: Literal["gate", "sum", "hidden"] = "gate"  # stage 2: ablations of gate fusion (table 2)
    replay: float = 0.0  # stage 1a: share of rows that are dialogues as text, of `replay_data`
    replay_data: str | None = None  # a .jsonl of dialogues or a data set; None is `data`
    ctc: float = 0.0  # stage 1a: weight of a CTC loss of the questions' text (see the stage)
    ctc_steps: int = 0  # stage 1a: first steps, in which speech is learned by that loss alone
    mel_masks: int = 0  # stage 1a: bands and stretches of time to hide in a recording (SpecAugment)
    frames: str | None = None  # stages 1a and 2: the encoder's frames, from `omni2 frames`
    hidden: str | None = None  # stage 2: the LLM's hidden states, computed by `omni2 hidden`
    reset: Annotated[tuple[str, ...], pydantic.BeforeValidator(one_or_more)] = ()
    # ^ parts to initialise at random instead of reading them from the checkpoint (table 3)
    chunks: Annotated[tuple[int, ...], pydantic.BeforeValidator(one_or_more)] = ()
    # ^ stage flow: chunk sizes to draw from, 0 = the whole reply; empty = the checkpoint's size
    # Stage units: a checkpoint, the speech encoder of which the tokenizer starts from.
    whisper: str | None = None
    # Stage flow: steps in which the encoder alone learns the mel, before the estimator does.
    mu_steps: int = 0
    # Stage flow: recordings of one voice, for a flow without a speaker encoder (flow.speaker is 1).
    one_voice: bool = False
    vocoder: Annotated[VocoderTraining, from_sequence(VocoderTraining)] = field(
        default_factory=VocoderTraining
    )  # stage vocoder
    # How it is computed
    mesh: Annotated[MeshConfig, from_sequence(MeshConfig)] = field(default_factory=MeshConfig)
    # Of the computation; trained weights are kept in float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"
    loss_block: int = 256  # positions whose logits exist at the same time
    workers: int = 4  # threads that read examples
    strict: bool = False  # stop at a damaged record instead of leaving it out
    # What is saved and reported
    save_every: int = 500
    keep: int = 2  # saved states
    validate_every: int = 500
    samples: int = 2  # validation dialogues that the model answers at each validation
    max_sample_text: int = 100  # text tokens of such an answer
    profile: tuple[int, int] | None = None  # first and last step to trace with the JAX profiler
    peak_flops: float | None = None  # of one device, if devices.py does not know it; for the MFU

    def __post_init__(self):
        smallest = dict.fromkeys(("seed", "rank", "samples", "mu_steps"), 0)
        smallest |= dict.fromkeys(("ctc_steps", "mel_masks"), 0)
        smallest |= dict.fromkeys(("batch", "microbatches", "loss_block", "workers"), 1)
        smallest |= dict.fromkeys(("save_every", "keep", "validate_every", "max_sample_text"), 1)
        faults = [
            f"{name} is {getattr(self, name)}, expected at least {low}"
            for name, low in smallest.items()
            if getattr(self, name) < low
        ]
        if self.batch % max(self.microbatches, 1):
            faults.append(f"batch {self.batch} cannot be cut into {self.microbatches} microbatches")
        if (self.steps is not None and self.steps < 1) or not self.epochs > 0:
            faults.append("steps and epochs must be positive")
        if not self.buckets:
            faults.append("buckets is empty; at least one is needed")
        if self.profile and not 0 <= self.profile[0] <= self.profile[1]:
            faults.append(f"profile is {self.profile}, expected a first and a last step")
        faults += stages.faults(self)
        if faults:
            raise ValueError("; ".join(faults))


# The settings that may change when a run is resumed: they affect speed, memory or reports, not the
# result.
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
    "max_sample_text",
    "profile",
    "peak_flops",
}

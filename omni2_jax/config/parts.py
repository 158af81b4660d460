"""The dimensions of every part.

Defaults: the released LLaMA-Omni2-0.5B with its CosyVoice2 decoder.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from omni2_jax.config.ranges import (
    STRICT,
    Count,
    Dilations,
    Fraction,
    Size,
    Sizes,
    Theta,
    TokenId,
    Vocabulary,
    check_heads,
    check_lengths,
    require,
)

# How matrices are stored and read: as floating numbers, or as int8 with a scale for each output.
WeightType = Literal["float", "int8"]
UNITS_PER_SECOND = 25  # of speech, fixed by the S3 tokenizer
FRAMES_PER_UNIT = 2  # mel frames of the flow and the vocoder: 50 a second
SAMPLES_PER_FRAME = 320  # of the speech encoder, at 16 kHz: a frame is 20 ms


@dataclass(frozen=True, config=STRICT)
class DecoderConfig:
    """A decoder-only language model: the LLM, and with a larger vocabulary the speech LM.

    The defaults are Qwen2.5-0.5B's.
    """

    vocabulary: Vocabulary = 151936
    width: Size = 896
    layers: Count = 24
    heads: Count = 14
    kv_heads: Count = 2
    head_size: Annotated[int, Field(ge=0, le=4096)] = 0  # 0 is replaced by width // heads
    hidden: Size = 4864
    rope_theta: Theta = 1e6
    norm_eps: Annotated[float, Field(gt=0, le=0.1, allow_inf_nan=False)] = 1e-6
    tied: bool = True  # the embedding table is the output matrix as well
    qkv_bias: bool = True  # biases of queries, keys and values: Qwen2 has them, Qwen3 does not
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, as in Qwen3
    max_positions: Annotated[int, Field(ge=1, le=100_000_000)] = 32768  # kept for the export
    rank: Annotated[int, Field(ge=0, le=4096)] = 0  # of LoRA updates while they are trained
    weights: WeightType = "float"  # of all matrices

    def __post_init__(self):
        if not self.head_size:
            require(
                self.width % self.heads == 0,
                f"{self.heads} heads do not divide the width of {self.width};"
                " expected heads that do, or a head_size",
            )
            object.__setattr__(self, "head_size", self.width // self.heads)
        require(
            self.heads % self.kv_heads == 0,
            f"kv_heads is {self.kv_heads}, expected a divisor of heads, which is {self.heads}",
        )
        require(self.head_size % 2 == 0, f"head_size is {self.head_size}, expected an even number")


@dataclass(frozen=True, config=STRICT)
class SpeechEncoderConfig:
    """Whisper's encoder: a window of log-mel in, `frames` out. Defaults: large-v3's, with 30 s."""

    mels: Size = 128
    frames: Annotated[int, Field(ge=1, le=100_000)] = 1500  # of the window: 50 a second
    width: Size = 1280
    layers: Count = 32
    heads: Count = 20
    hidden: Size | None = None  # of the feed-forward networks; None is OpenAI's 4 * width
    weights: WeightType = "float"  # of the blocks' matrices

    def __post_init__(self):
        check_heads(self.heads, self.width)


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    """`stride` encoder frames through two layers to the LLM's width (paper section 2.1)."""

    stride: Annotated[int, Field(ge=1, le=1500)] = 5
    hidden: Size = 2048


@dataclass(frozen=True, config=STRICT)
class FlowConfig:
    """Causal conditional flow matching of CosyVoice2: units to mel frames."""

    units: Vocabulary = 6561
    width: Size = 512
    heads: Count = 8
    hidden: Size = 2048
    layers: Count = 6
    up_layers: Count = 4
    mels: Annotated[int, Field(ge=1, le=1024)] = 80
    # Size of an x-vector; 1 for a flow of one voice, whose x-vector is always the number 1.
    speaker: Size = 192
    # The flow works on (mel - mel_mean) / mel_std; the released one on the log-mel itself.
    mel_mean: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0.0
    mel_std: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    upsample: Literal[2] = FRAMES_PER_UNIT
    lookahead: Annotated[int, Field(ge=1, le=100)] = 3  # units
    chunk: Annotated[int, Field(ge=1, le=10_000)] = 50  # units that attend to one another
    channels: Size = 256
    estimator_heads: Count = 8
    estimator_head_size: Annotated[int, Field(ge=1, le=4096)] = 64
    blocks: Count = 4  # transformer blocks behind each residual block
    mid_blocks: Count = 12
    steps: Annotated[int, Field(ge=1, le=100)] = 10  # of Euler's method
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.7
    guidance_dropout: Fraction = 0.2
    sigma_min: Fraction = 1e-6
    noise_frames: Annotated[int, Field(ge=1, le=1_000_000)] = 15000  # 50 a second: 300 s at most

    def __post_init__(self):
        check_heads(self.heads, self.width)
        require(self.width % 2 == 0, f"width is {self.width}, expected an even number")


@dataclass(frozen=True, config=STRICT)
class HiftConfig:
    """HiFT vocoder: neural source filter and inverse STFT, 480 samples per mel frame."""

    kind: Literal["hift"] = "hift"  # which vocoder this is, see models/vocoder/__init__.py
    mels: Annotated[int, Field(ge=1, le=1024)] = 80
    channels: Size = 512
    harmonics: Annotated[int, Field(ge=0, le=100)] = 8
    sample_rate: Literal[24000] = 24000  # the rate of all audio that is written
    sine_amplitude: Fraction = 0.1
    noise_deviation: Fraction = 0.003
    # Whether each harmonic of the source begins at a random phase of its own, as in the released
    # weights. Without, a vocoder learns the phases of a voice more easily.
    random_phases: bool = True
    voiced_threshold: Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)] = 10.0  # Hz
    upsample: Sizes = (8, 5, 3)
    upsample_kernels: Sizes = (16, 11, 7)
    n_fft: Annotated[int, Field(ge=2, le=4096)] = 16
    hop: Annotated[int, Field(ge=1, le=4096)] = 4
    resblock_kernels: Sizes = (3, 7, 11)
    resblock_dilations: Dilations = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_kernels: Sizes = (7, 7, 11)
    source_dilations: Dilations = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    slope: Fraction = 0.1
    limit: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.99
    f0_channels: Size = 512
    # Mel frames that a stream's next step vocodes again, with a cross-fade of their samples.
    overlap: Annotated[int, Field(ge=1, le=1000)] = 8

    def __post_init__(self):
        check_lengths(self, "upsample", "upsample_kernels", "source_kernels", "source_dilations")
        check_lengths(self, "resblock_kernels", "resblock_dilations")
        require(
            self.samples_per_frame * UNITS_PER_SECOND * FRAMES_PER_UNIT == self.sample_rate,
            f"upsample {list(self.upsample)} and hop {self.hop} make {self.samples_per_frame}"
            " samples of a mel frame, expected 480 (24000 samples and 50 frames a second)",
        )
        require(
            self.n_fft % (2 * self.hop) == 0,
            f"n_fft is {self.n_fft}, expected a multiple of 2 * hop, which is {2 * self.hop}",
        )
        require(
            self.channels % 2 ** len(self.upsample) == 0,
            f"channels is {self.channels}, expected a multiple of {2 ** len(self.upsample)}:"
            " each stage halves them",
        )
        for rate, kernel in zip(self.upsample, self.upsample_kernels, strict=True):
            require(
                kernel >= rate and (kernel - rate) % 2 == 0,
                f"upsample_kernels has {kernel} for a rate of {rate},"
                " expected at least the rate and an even difference",
            )
        for name in ("resblock_kernels", "source_kernels"):
            kernels = getattr(self, name)
            require(
                all(kernel % 2 for kernel in kernels),
                f"{name} is {list(kernels)}, expected odd numbers",
            )

    @property
    def samples_per_frame(self) -> int:
        """Samples that one mel frame becomes."""
        return math.prod(self.upsample) * self.hop


@dataclass(frozen=True, config=STRICT)
class SpeakerConfig:
    """CAM++ speaker encoder: 80-bin fbank to an x-vector."""

    mels: Annotated[int, Field(ge=8, le=1024, multiple_of=8)] = 80
    embedding: Size = 192
    head_channels: Size = 32
    channels: Annotated[Size, Field(multiple_of=2)] = 128
    growth: Annotated[Size, Field(multiple_of=2)] = 32
    bottleneck: Annotated[int, Field(ge=1, le=64)] = 4
    layers: tuple[Count, Count, Count] = (12, 24, 16)


@dataclass(frozen=True, config=STRICT)
class SpeechTokenizerConfig:
    """S3 speech tokenizer v2: 100 mel frames to 25 units a second.

    It makes training data and is no part of the model.
    """

    mels: Size = 128
    width: Size = 1280
    layers: Count = 6
    heads: Count = 20
    hidden: Size | None = None  # of the feed-forward networks; None is 4 * width
    fsmn_taps: Annotated[int, Field(ge=1, le=1000)] = 31  # of the FSMN convolution, centred
    rope_theta: Theta = 1e4
    digits: Annotated[int, Field(ge=1, le=12)] = 8  # of a unit, each -1, 0 or 1
    # Mel frames read at once (30 s); a longer recording is read in windows that share `overlap`
    # frames. Half the overlap is a whole number of units.
    window: Annotated[int, Field(ge=8, le=100_000, multiple_of=4)] = 3000
    overlap: Annotated[int, Field(ge=8, le=100_000, multiple_of=8)] = 400

    def __post_init__(self):
        check_heads(self.heads, self.width)
        require(
            self.width // self.heads % 2 == 0,
            f"width {self.width} over {self.heads} heads is {self.width // self.heads},"
            " expected an even head size",
        )
        require(
            self.overlap < self.window,
            f"overlap is {self.overlap}, expected less than the window of {self.window}",
        )

    @property
    def units(self) -> int:
        """Number of different units."""
        return 3**self.digits


@dataclass(frozen=True, config=STRICT)
class TokenConfig:
    """Ids that the read/write rules need (tokenizers of the release)."""

    speech: TokenId = 151665  # <speech>: where the 300 speech features go
    text_eos: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=100)] = (151645,)
    sep: TokenId = 151665  # <sep> in the speech LM's vocabulary; unit u is sep + 1 + u
    unit_eos: TokenId = 151643

"""The dimensions of every part. Defaults are those of the released LLaMA-Omni2-0.5B and its CosyVoice2 decoder."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pydantic

LANGUAGE_PARTS = ("speech_encoder", "adapter", "llm", "fusion", "speech_lm")
DECODER_PARTS = ("flow", "vocoder", "speaker")
PARTS = LANGUAGE_PARTS + DECODER_PARTS  # in the order of the data's path


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model: the LLM, and with a larger vocabulary the speech LM. The defaults are Qwen2.5-0.5B's."""

    vocabulary: int = 151936
    width: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    head_size: int = 0  # 0 is replaced by width // heads
    hidden: int = 4864
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True  # the embedding table is the output matrix as well
    qkv_bias: bool = True  # biases of queries, keys and values: Qwen2 has them, Qwen3 does not
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, as in Qwen3
    max_positions: int = 32768
    rank: int = 0  # of low-rank updates (LoRA) beside every matrix, while they are trained

    def __post_init__(self):
        if not self.head_size:
            object.__setattr__(self, "head_size", self.width // self.heads)


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Whisper-large-v3's encoder: 30 s of log-mel in, 1500 frames out."""

    mels: int = 128
    frames: int = 1500
    width: int = 1280
    layers: int = 32
    heads: int = 20
    hidden: int | None = None  # of the MLPs; None is OpenAI's 4 * width


@dataclass(frozen=True)
class AdapterConfig:
    """Concatenate `stride` encoder frames, then a two-layer FFN to the LLM's width (paper section 2.1)."""

    stride: int = 5
    hidden: int = 2048


@dataclass(frozen=True)
class FlowConfig:
    """Causal conditional flow matching of CosyVoice2: units to mel frames."""

    units: int = 6561
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    layers: int = 6
    up_layers: int = 4
    mels: int = 80
    speaker: int = 192
    upsample: int = 2
    lookahead: int = 3
    chunk: int = (
        50  # units that see one another (100 mel frames); the masks stay on when finalizing
    )
    channels: int = 256
    estimator_heads: int = 8
    estimator_head_size: int = 64
    blocks: int = 4  # transformer blocks behind each residual block
    mid_blocks: int = 12
    steps: int = 10
    guidance: float = 0.7
    guidance_dropout: float = 0.2
    sigma_min: float = 1e-6
    noise_frames: int = 15000  # 50 a second: 300 s at most


@dataclass(frozen=True)
class HiftConfig:
    """HiFT vocoder: neural source filter and inverse STFT, 480 samples per mel frame."""

    mels: int = 80
    channels: int = 512
    harmonics: int = 8
    sample_rate: int = 24000
    sine_amplitude: float = 0.1
    noise_deviation: float = 0.003
    voiced_threshold: float = 10.0
    upsample: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    n_fft: int = 16
    hop: int = 4
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_kernels: tuple[int, ...] = (7, 7, 11)
    source_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    slope: float = 0.1
    limit: float = 0.99
    f0_channels: int = 512
    overlap: int = 8  # mel frames that a stream's next chunk vocodes again; their samples are held back and cross-faded

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.upsample) * self.hop


@dataclass(frozen=True)
class SpeakerConfig:
    """CAM++ speaker encoder: 80-bin fbank to an x-vector."""

    mels: int = 80
    embedding: int = 192
    head_channels: int = 32
    channels: int = 128
    growth: int = 32
    bottleneck: int = 4
    layers: tuple[int, ...] = (12, 24, 16)


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """S3 speech tokenizer v2: 100 mel frames to 25 units a second. It makes training data and is no part of the model."""

    mels: int = 128
    width: int = 1280
    layers: int = 6
    heads: int = 20
    hidden: int | None = None  # of the MLPs; None is 4 * width
    memory: int = 31  # taps of the FSMN memory, centred
    rope_theta: float = 1e4
    digits: int = 8  # of a unit, each 0, 1 or 2
    window: int = 3000  # mel frames read at once (30 s); a longer clip is read in windows
    overlap: int = (
        400  # mel frames that neighbouring windows share; half of it is a whole number of units
    )

    @property
    def units(self) -> int:
        return 3**self.digits


@dataclass(frozen=True)
class TokenConfig:
    """Ids that the read/write rules need (tokenizers of the release)."""

    speech: int = 151665  # <speech>: where the 300 speech features go
    text_eos: tuple[int, ...] = (151645,)
    sep: int = 151665  # <sep> in the speech LM's vocabulary; unit u is sep + 1 + u
    unit_eos: int = 151643


@dataclass(frozen=True)
class Omni2Config:
    """The whole model. A part that a checkpoint lacks is None."""

    __pydantic_config__ = pydantic.ConfigDict(
        extra="forbid"
    )  # another program's config.json must not pass for ours

    llm: DecoderConfig | None = field(default_factory=DecoderConfig)
    speech_encoder: SpeechEncoderConfig | None = field(default_factory=SpeechEncoderConfig)
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    speech_lm: DecoderConfig | None = field(
        default_factory=lambda: DecoderConfig(vocabulary=158227)
    )
    flow: FlowConfig | None = field(default_factory=FlowConfig)
    vocoder: HiftConfig | None = field(default_factory=HiftConfig)
    speaker: SpeakerConfig | None = field(default_factory=SpeakerConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    mix: Literal["gate", "sum", "hidden", "text"] = (
        "gate"  # what the speech LM hears of a text token (fusion.py); "text": the token alone
    )
    units: int = 6561
    read: int = 3  # R: text tokens read before each write
    write: int = 10  # W: speech units written after each read
    max_prompt: int = 4096  # LLM positions a conversation may take (tokenizer_model_max_length)

    def replace(self, **changes) -> "Omni2Config":
        return dataclasses.replace(self, **changes)

    def only(self, *parts: str) -> "Omni2Config":
        """The same model with no other parts than these."""
        fields = [f.name for f in dataclasses.fields(self) if f.name in PARTS]
        return self.replace(**{name: None for name in fields if name not in parts})

    def save(self, path: Path) -> None:
        """Write config.json, whole or not at all."""
        work = path.with_name(path.name + ".partial")
        work.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        work.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Omni2Config":
        """Read config.json; raises ValueError naming the file and every bad key."""
        try:
            return pydantic.TypeAdapter(cls).validate_json(path.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"{path.parent} is not an omni2-jax checkpoint: it has no {path.name}"
            ) from None
        except (pydantic.ValidationError, UnicodeDecodeError) as error:
            faults = error.errors() if isinstance(error, pydantic.ValidationError) else []
            if any(e["loc"] == ("model_type",) for e in faults):
                told = "is not an omni2-jax config but a Hugging Face one; convert its directory first (python -m convert)"
                raise ValueError(f"{path} {told}") from None
            detail = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in faults
            ) or str(error)
            raise ValueError(f"{path} is not an omni2-jax config: {detail}") from None

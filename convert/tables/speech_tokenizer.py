"""S3 speech tokenizer v2: s3tokenizer's state dict, or the released speech_tokenizer_v2.onnx under its names, <-> omni2_jax.units."""

from collections.abc import Mapping
from pathlib import Path

from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.convert.formats import onnx_file, safetensors, torch_file
from omni2_jax.convert.plan import ConversionError, Rule, Source, Table, conv, kernel
from omni2_jax.convert.tables import whisper
from omni2_jax.convert.tables.speech_tokenizer_onnx import from_onnx

HEAD_SIZE = 64  # of every S3 tokenizer: its rotary table is made for it
QUANTIZER = "quantizer._codebook.project_down"


def table() -> Table:
    """torch names; the encoder has Whisper's but for the positions and the last normalisation."""
    encoder = [
        rule
        for rule in whisper.table().rules
        if rule.target.partition(".")[0] not in ("positions", "norm")
    ]
    memory = Rule("blocks.{i}.attn.fsmn_block.weight", "blocks.memory.kernel", conv)
    project = (
        Rule(f"{QUANTIZER}.weight", "project.kernel", kernel()),
        Rule(f"{QUANTIZER}.bias", "project.bias"),
    )
    return Table((*encoder, memory)).at("encoder.") + Table(project)


def read(path: Path) -> dict[str, Source]:
    """The tensors of a .safetensors or .onnx file, or of a torch file, under torch names."""
    match path.suffix:
        case ".onnx":
            return from_onnx(onnx_file(path), str(path))
        case ".safetensors":
            return safetensors(path)
        case _:
            return torch_file(path)


def infer_config(source: Mapping[str, Source], where: str) -> SpeechTokenizerConfig:
    """The dimensions, from the shapes of torch-named tensors."""
    try:
        width, mels, _ = source["encoder.conv1.weight"].shape
        taps = source["encoder.blocks.0.attn.fsmn_block.weight"].shape[-1]
        digits = source[f"{QUANTIZER}.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ConversionError(
            f"{where} is not a speech tokenizer v2: {error} is missing or of another rank"
        ) from None
    layers = sum(name.endswith(".attn.fsmn_block.weight") for name in source)
    return SpeechTokenizerConfig(
        mels=mels,
        width=width,
        layers=layers,
        heads=width // HEAD_SIZE,
        fsmn_taps=taps,
        digits=digits,
    )

"""S3 speech tokenizer v2 <-> `models.speech_tokenizer.SpeechTokenizer`.

The source is the state dict of the s3tokenizer package, or the released speech_tokenizer_v2.onnx
under its names. Reference: `S3TokenizerV2` of s3tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.convert import safetensors_files
from omni2_jax.convert.formats import onnx_file, torch_file
from omni2_jax.convert.json_files import checked
from omni2_jax.convert.plan import ConversionError, Rule, Table, conv, kernel
from omni2_jax.convert.tables import whisper
from omni2_jax.convert.tables.speech_tokenizer_onnx import from_onnx

HEAD_SIZE = 64  # of every S3 tokenizer: its rotary table is made for it
QUANTIZER = "quantizer._codebook.project_down"


def table() -> Table:
    """The table in torch names.

    The encoder has Whisper's names; it has no positions and no last normalisation.
    """
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


def read(path: Path) -> dict[str, LazyArray]:
    """The tensors of a .safetensors or .onnx file, or of a torch file, under torch names.

    Raises ConversionError if the file cannot be read.
    """
    match path.suffix:
        case ".onnx":
            return from_onnx(onnx_file(path), str(path))
        case ".safetensors":
            return safetensors_files.read(path)
        case _:
            return torch_file(path)


def infer_config(source: Mapping[str, LazyArray], context: str) -> SpeechTokenizerConfig:
    """The dimensions, from the shapes of torch-named tensors.

    Raises ConversionError, which starts with `context`, if they are not a speech tokenizer's.
    """
    try:
        width, mels, _ = source["encoder.conv1.weight"].shape
        taps = source["encoder.blocks.0.attn.fsmn_block.weight"].shape[-1]
        digits = source[f"{QUANTIZER}.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{context} is not a speech tokenizer v2: {error} is missing or of another rank"
        ) from None
    fields = {
        "mels": mels,
        "width": width,
        "layers": sum(name.endswith(".attn.fsmn_block.weight") for name in source),
        "heads": width // HEAD_SIZE,
        "fsmn_taps": taps,
        "digits": digits,
    }
    return checked(SpeechTokenizerConfig, context, fields)

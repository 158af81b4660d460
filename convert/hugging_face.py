"""What Hugging Face directories say about themselves -> our configuration.

Three kinds: a LLaMA-Omni2 release, a plain language model, and a Whisper.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni2_jax.checkpoint import tokenizer
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import PARTS, AdapterConfig, Omni2Config, SpeechEncoderConfig
from omni2_jax.console import say
from omni2_jax.convert import ctranslate2, families, json_files
from omni2_jax.convert.families import qwen2
from omni2_jax.convert.formats import torch_dims
from omni2_jax.convert.json_files import checked, short
from omni2_jax.convert.plan import ConversionError

OMNI2 = "omni2_speech2s_qwen2"  # the model_type of a LLaMA-Omni2 release
HEADS = "speech_encoder_heads"  # in the config.json of our exports, which have no Whisper file
EMPTY_CONFIG = Omni2Config().only()

WHISPER_FIELDS = {  # ours -> theirs
    "mels": "num_mel_bins",
    "frames": "max_source_positions",
    "width": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "hidden": "encoder_ffn_dim",
}
OMNI2_NAMES = {  # ours -> theirs, for messages
    "adapter.stride": "speech_encoder_ds_rate",
    "tokens.text_eos": "eos_token_id",
    "tokens.unit_eos": "speech_generator.eos_token_id",
    "units": "unit_vocab_size",
    "max_prompt": "tokenizer_model_max_length",
}


def omni2(
    directory: Path, sources: Mapping[str, LazyArray], whisper: Path | None = None
) -> Omni2Config:
    """The language side of a LLaMA-Omni2 release directory, without a decoder.

    sources: the release's tensors. whisper: a file or directory that states the encoder's heads.
    Raises ConversionError naming the file and what is wrong with it.
    """
    path = directory / "config.json"
    config = json_files.read(path)
    expect(config, path, "model_type", OMNI2)
    for key, value in {"speech_encoder_type": "whisper", "speech_projector_type": "linear"}.items():
        expect({key: value} | config, path, key, value)
    generator = config.get("speech_generator")
    if not isinstance(generator, dict):
        raise ConversionError(f"{path} has no speech_generator: this is a speech-to-text model")
    expect(generator, f"{path}: speech_generator", "model_type", "qwen2")
    read, write = stream_params(config.get("stream_params"), path)
    heads = whisper_heads(directory, config, whisper)
    fields = {
        "llm": qwen2.read_config(config, path),
        "speech_lm": qwen2.read_config(generator, f"{path}: speech_generator"),
        "speech_encoder": speech_encoder(sources, "model.speech_encoder.", directory, heads),
        "adapter": {
            "stride": config.get("speech_encoder_ds_rate", AdapterConfig.stride),
            "hidden": adapter_hidden(sources),
        },
        "tokens": {
            "speech": added_token(directory, "<speech>"),
            "text_eos": end_tokens(directory, config),
            "sep": added_token(directory / "tts_tokenizer", "<sep>"),
            "unit_eos": generator.get("eos_token_id"),
        },
        "units": config.get("unit_vocab_size", 6561),
        "read": read,
        "write": write,
        "max_prompt": config.get("tokenizer_model_max_length", 4096),
    }
    absent = {"flow": None, "vocoder": None, "speaker": None}
    return whole(path, fields | absent)


def whole(path: Path, fields: Mapping[str, Any]) -> Omni2Config:
    """The configuration of several parts, their relations checked too. Raises ConversionError."""
    config = checked(Omni2Config, path, fields, OMNI2_NAMES)
    try:
        config.check()
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None
    return config


def expect(config: Mapping[str, Any], context: Path | str, key: str, value: str) -> None:
    """Raise ConversionError, which starts with `context`, unless config[key] is `value`."""
    if config.get(key) != value:
        raise ConversionError(
            f"{context}: {key} is {short.repr(config.get(key))}, expected {value!r}"
        )


def stream_params(text: Any, path: Path) -> tuple[int, int]:
    """The string "(R,W)" as two positive integers; it is parsed, never evaluated.

    Raises ConversionError if it is something else.
    """
    parts = str(text).strip(" ()[]").split(",")
    try:
        read, write = (int(part) for part in parts)
    except ValueError:
        read = write = 0
    if read < 1 or write < 1:
        raise ConversionError(
            f"{path}: stream_params is {short.repr(text)}, "
            "expected '(R,W)' with two positive integers"
        )
    return read, write


def adapter_hidden(sources: Mapping[str, LazyArray]) -> int:
    """The adapter's hidden size, from its tensors; the default where they are missing."""
    kernel = sources.get("model.speech_projector.linear1.weight")
    return kernel.shape[0] if kernel and kernel.shape else AdapterConfig.hidden


def speech_encoder(
    sources: Mapping[str, LazyArray], prefix: str, context: Path | str, heads: Any = None
) -> SpeechEncoderConfig:
    """The encoder's dimensions from its tensors, which have OpenAI's names behind `prefix`.

    heads: None where no file states them; Whisper's are 64 wide.
    Raises ConversionError, which starts with `context`, if there is no speech encoder.
    """
    try:
        width, mels, _ = sources[prefix + "conv1.weight"].shape
        frames = sources[prefix + "positional_embedding"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{context} has no speech encoder: {error} is missing or of another rank"
        ) from None
    layers = sum(
        name.startswith(prefix + "blocks.") and name.endswith("attn.query.weight")
        for name in sources
    )
    heads = max(1, width // 64) if heads is None else heads
    fields = {"mels": mels, "frames": frames, "width": width, "layers": layers, "heads": heads}
    return checked(SpeechEncoderConfig, f"{context}: the speech encoder", fields)


def whisper_heads(directory: Path, config: Mapping[str, Any], whisper: Path | None) -> Any:
    """Attention heads of a release's encoder; None where no file states them.

    The first of these decides: the Whisper that the user gives, the config.json (an export of ours
    says it), the .pt inside the release that its config.json names. A path that leads out of the
    release is not followed. Raises ConversionError if a file is damaged.
    """
    if whisper and ctranslate2.is_directory(whisper):
        return ctranslate2.whisper(whisper)[0].heads
    if whisper and whisper.is_dir():
        return whisper_directory(whisper).heads
    if whisper:
        return torch_dims(whisper).get("n_audio_head")
    if HEADS in config:
        return config[HEADS]
    path, name = directory / "config.json", config.get("speech_encoder")
    if name is None or name == "":
        return None
    if isinstance(name, str) and json_files.leads_outside(name):
        say(
            f"{path}: speech_encoder leads out of the directory and is not read; "
            "give it as --whisper if its attention heads are not 64 wide"
        )
        return None
    file = json_files.inside(directory, name, f"{path}: speech_encoder")
    return torch_dims(file).get("n_audio_head") if file.is_file() else None


def end_tokens(directory: Path, config: Mapping[str, Any]) -> Any:
    """The tokens that end a text: generation_config.json, else config.json, else the tokenizer.

    They are not checked yet. Raises ConversionError if none of the three has them.
    """
    generation = directory / "generation_config.json"
    stated = (
        json_files.read(generation).get("eos_token_id") if generation.exists() else None,
        config.get("eos_token_id"),
    )
    eos = next((value for value in stated if value is not None), None)
    if eos is None:
        eos = tokenizer.load(directory).eos_token_id
    if eos is None:
        raise ConversionError(f"{directory / 'config.json'} has no eos_token_id")
    return tuple(eos) if isinstance(eos, list) else (eos,)


def added_token(directory: Path, token: str) -> int:
    """The id of a special token. Raises ConversionError if the tokenizer does not have it."""
    vocabulary = tokenizer.load(directory).get_vocab()
    if token not in vocabulary:
        raise ConversionError(f"the tokenizer in {directory} has no {token}")
    return vocabulary[token]


def language_model(directory: Path) -> tuple[Omni2Config, families.Family]:
    """A plain language model of one of the FAMILIES, as the LLM of a model without other parts.

    Raises ConversionError naming the file and what is wrong with it.
    """
    path = directory / "config.json"
    config = json_files.read(path)
    family = families.of_config(config, path)
    fields = dict.fromkeys(PARTS) | {
        "llm": family.read_config(config, path),
        "tokens": {"text_eos": end_tokens(directory, config)},
    }
    del fields["fusion"]  # it has no configuration
    return whole(path, fields), family


def whisper_directory(directory: Path) -> SpeechEncoderConfig:
    """The encoder of a Hugging Face Whisper directory.

    Raises ConversionError naming the file and what is wrong with it.
    """
    path = directory / "config.json"
    config = json_files.read(path)
    expect(config, path, "model_type", "whisper")
    fields = {ours: config.get(theirs) for ours, theirs in WHISPER_FIELDS.items()}
    return checked(SpeechEncoderConfig, path, fields, WHISPER_FIELDS)

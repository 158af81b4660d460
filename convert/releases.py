"""What a directory of the language side says about itself, in config.json, tokenizers and shards -> our configuration, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from omni2_jax.checkpoint import tokenizer
from omni2_jax.config import (
    AdapterConfig,
    DecoderConfig,
    Omni2Config,
    SpeechEncoderConfig,
    TokenConfig,
)
from omni2_jax.convert.formats import reason, safetensors, torch_dims
from omni2_jax.convert.plan import ConversionError, Source
from omni2_jax.validation import validated

OMNI2 = "omni2_speech2s_qwen2"
HEADS = "speech_encoder_heads"  # in what we export, which has no Whisper file beside it
EMPTY_CONFIG = Omni2Config().only()

T = TypeVar("T")


def checked(kind: type[T], where: Path | str, **fields) -> T:
    """A configuration whose fields have the types that they should have."""
    try:
        return validated(kind, fields, where)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def weights(directory: Path) -> Path:
    """Where a directory's tensors are: model.safetensors, or the index of its shards."""
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (directory / name).exists():
            return directory / name
    raise ConversionError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json"
    )


def tensors(path: Path) -> dict[str, Source]:
    """Every tensor of `weights`."""
    if path.suffix == ".safetensors":
        return safetensors(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{path} has no weight_map")
    shards = {name: safetensors(path.parent / name) for name in sorted(set(weight_map.values()))}
    absent = [
        f"{name} (in {shard})" for name, shard in weight_map.items() if name not in shards[shard]
    ]
    if absent:
        raise ConversionError(
            f"{path} lists tensors that its shards do not hold: {', '.join(absent[:20])}"
        )
    return {name: source for shard in shards.values() for name, source in shard.items()}


def qwen2(config: dict, where: Path | str, kind: str = "qwen2") -> DecoderConfig:
    """A Hugging Face Qwen2 config as ours; raises on what our Qwen2 does not do."""
    if config.get("model_type") != kind:
        raise ConversionError(
            f"{where}: model_type is {config.get('model_type')!r}, expected {kind!r}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (
        config.get("use_sliding_window")
        or rope.get("rope_type", rope.get("type", "default")) != "default"
    ):
        raise ConversionError(
            f"{where}: sliding windows and scaled positions are not supported (no LLaMA-Omni2 release uses them)"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"{where}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    try:
        return checked(
            DecoderConfig,
            where,
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            hidden=config["intermediate_size"],
            rope_theta=config.get(
                "rope_theta", rope.get("rope_theta", 1e4)
            ),  # transformers' default
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 32768),
        )
    except KeyError as error:
        raise ConversionError(f"{where} has no {error}") from None


def stream_params(text: str, where: Path) -> tuple[int, int]:
    """The string "(R,W)" as two positive integers; it is parsed, never evaluated."""
    parts = str(text).strip(" ()[]").split(",")
    try:
        read, write = (int(part) for part in parts)
    except ValueError:
        read = write = 0
    if read < 1 or write < 1:
        raise ConversionError(
            f"{where}: stream_params is {text!r}, expected '(R,W)' with two positive integers"
        )
    return read, write


def speech_encoder(
    sources: Mapping[str, Source], prefix: str, where: Path | str, heads: int | None = None
) -> SpeechEncoderConfig:
    """The encoder's dimensions from its tensors (OpenAI names). Whisper's heads are 64 wide unless the file says otherwise."""
    try:
        width, mels, _ = sources[prefix + "conv1.weight"].shape
        frames = sources[prefix + "positional_embedding"].shape[0]
    except (KeyError, ValueError) as error:
        raise ConversionError(
            f"{where} has no speech encoder: {error} is missing or of another rank"
        ) from None
    layers = sum(
        name.startswith(prefix + "blocks.") and name.endswith("attn.query.weight")
        for name in sources
    )
    return SpeechEncoderConfig(
        mels=mels, frames=frames, width=width, layers=layers, heads=heads or max(1, width // 64)
    )


def omni2(
    directory: Path, sources: Mapping[str, Source], whisper: Path | None = None
) -> Omni2Config:
    """The language side of a LLaMA-Omni2 release directory (no decoder)."""
    path = directory / "config.json"
    config = read_json(path)
    for key, expected in {
        "speech_encoder_type": "whisper",
        "speech_projector_type": "linear",
    }.items():
        if config.get(key, expected) != expected:
            raise ConversionError(f"{path}: {key} is {config[key]!r}, expected {expected!r}")
    llm, generator = qwen2(config, path, OMNI2), config.get("speech_generator")
    if not isinstance(generator, dict):
        raise ConversionError(f"{path} has no speech_generator: this is a speech-to-text model")
    read, write = stream_params(config.get("stream_params"), path)
    text_eos = end_tokens(directory, config)
    adapter = sources.get("model.speech_projector.linear1.weight")
    sep = added_token(directory / "tts_tokenizer", "<sep>")
    found = checked(
        Omni2Config,
        path,
        llm=llm,
        speech_encoder=speech_encoder(
            sources, "model.speech_encoder.", directory, whisper_heads(directory, config, whisper)
        ),
        adapter={
            "stride": config.get("speech_encoder_ds_rate", AdapterConfig.stride),
            "hidden": adapter.shape[0] if adapter else AdapterConfig.hidden,
        },
        speech_lm=qwen2(generator, f"{path}: speech_generator"),
        flow=None,
        vocoder=None,
        speaker=None,
        tokens={
            "speech": added_token(directory, "<speech>"),
            "text_eos": text_eos,
            "sep": sep,
            "unit_eos": generator.get("eos_token_id"),
        },
        units=config.get("unit_vocab_size", 6561),
        read=read,
        write=write,
        max_prompt=config.get("tokenizer_model_max_length", 4096),
    )
    if (vocabulary := found.speech_lm.vocabulary) < sep + 1 + found.units:
        raise ConversionError(
            f"{path}: {found.units} units follow <sep>, which is {sep}, but the speech LM has only {vocabulary} tokens"
        )
    return found


def end_tokens(directory: Path, config: dict) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json, else config.json, else the tokenizer says."""
    generation = directory / "generation_config.json"
    stated = (
        read_json(generation).get("eos_token_id") if generation.exists() else None,
        config.get("eos_token_id"),
    )
    eos = next((given for given in stated if given is not None), None)
    if eos is None:
        eos = tokenizer.load(directory).eos_token_id
    if eos is None:
        raise ConversionError(f"{directory / 'config.json'} has no eos_token_id")
    return tuple(eos) if isinstance(eos, list) else (eos,)


def added_token(directory: Path, token: str) -> int:
    """The id of a special token in a tokenizer directory; raises when it is not there."""
    vocabulary = tokenizer.load(directory).get_vocab()
    if token not in vocabulary:
        raise ConversionError(f"the tokenizer in {directory} has no {token}")
    return vocabulary[token]


def whisper_heads(directory: Path, config: dict, whisper: Path | None) -> int | None:
    """Attention heads as the Whisper given, our own export, or the .pt beside the release says; None where none does."""
    if whisper and whisper.is_dir():
        return whisper_directory(whisper).heads
    if whisper is None and HEADS in config:
        return config[HEADS]
    path = whisper or directory / (config.get("speech_encoder") or "")
    return torch_dims(path).get("n_audio_head") if path.is_file() else None


def qwen_directory(directory: Path) -> Omni2Config:
    """A plain Hugging Face Qwen2.5 directory: an LLM and nothing else, what stage I(a) starts from."""
    path = directory / "config.json"
    config = read_json(path)
    llm, eos = qwen2(config, path), end_tokens(directory, config)
    return EMPTY_CONFIG.replace(llm=llm, tokens=checked(TokenConfig, path, text_eos=eos))


def whisper_directory(directory: Path) -> SpeechEncoderConfig:
    """The encoder of a Hugging Face Whisper directory."""
    path = directory / "config.json"
    config = read_json(path)
    if config.get("model_type") != "whisper":
        raise ConversionError(
            f"{path}: model_type is {config.get('model_type')!r}, expected 'whisper'"
        )
    names = {
        "mels": "num_mel_bins",
        "frames": "max_source_positions",
        "width": "d_model",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "hidden": "encoder_ffn_dim",
    }
    return checked(
        SpeechEncoderConfig, path, **{ours: config.get(theirs) for ours, theirs in names.items()}
    )


def hugging_face(config: DecoderConfig, eos: int | list[int]) -> dict:
    """Our Qwen2 dimensions under Hugging Face's names: what `qwen2` reads."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "eos_token_id": eos,
    }


def omni2_json(config: Omni2Config, dtype: str) -> dict:
    """The config.json of a LLaMA-Omni2 release."""
    eos = config.tokens.text_eos
    speech_lm = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": dtype,
        "bos_token_id": config.tokens.unit_eos,
    }
    return {
        "architectures": ["Omni2Speech2SQwen2ForCausalLM"],
        "model_type": OMNI2,
        "torch_dtype": dtype,
        "speech_encoder": "models/speech_encoder/large-v3.pt",
        "speech_encoder_type": "whisper",
        "speech_encoder_hidden_size": config.speech_encoder.width,
        HEADS: config.speech_encoder.heads,
        "speech_encoder_ds_rate": config.adapter.stride,
        "speech_projector_type": "linear",
        "stream_params": f"({config.read},{config.write})",
        "unit_vocab_size": config.units,
        "tokenizer_model_max_length": config.max_prompt,
        "tokenizer_padding_side": "right",
        "speech_generator": speech_lm | hugging_face(config.speech_lm, config.tokens.unit_eos),
    } | hugging_face(config.llm, eos[0] if len(eos) == 1 else list(eos))

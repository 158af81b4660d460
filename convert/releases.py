"""What a release directory says about itself: config.json, generation_config.json, tokenizer ids and shards -> our configuration."""

import json
from pathlib import Path

from convert.engine import ConversionError, Source
from convert.sources import safetensors
from omni2_jax.config import AdapterConfig, Omni2Config, Qwen2Config, SpeechEncoderConfig, TokenConfig

OMNI2 = "omni2_speech2s_qwen2"


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def tensors(directory: Path) -> dict[str, Source]:
    """Every tensor of a release directory: model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise ConversionError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        return safetensors(single)
    weight_map = read_json(index).get("weight_map", {})
    shards = {name: safetensors(directory / name) for name in sorted(set(weight_map.values()))}
    absent = [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        raise ConversionError(f"{index} lists tensors that its shards do not hold: {', '.join(absent[:20])}")
    return {name: source for shard in shards.values() for name, source in shard.items()}


def qwen2(config: dict, where: Path | str) -> Qwen2Config:
    """A Hugging Face Qwen2 config as ours; raises on what our Qwen2 does not do."""
    kind = config.get("model_type")
    if kind not in ("qwen2", OMNI2):
        raise ConversionError(f"{where}: model_type is {kind!r}, expected 'qwen2' or '{OMNI2}'")
    if config.get("use_sliding_window") or config.get("rope_scaling"):
        raise ConversionError(f"{where}: sliding windows and rope_scaling are not supported (no LLaMA-Omni2 release uses them)")
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"{where}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    try:
        return Qwen2Config(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            hidden=config["intermediate_size"],
            rope_theta=config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 1e6),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 32768),
        )
    except KeyError as error:
        raise ConversionError(f"{where}: config has no {error}") from None


def stream_params(text: str, where: Path) -> tuple[int, int]:
    """The string "(R,W)" as two positive integers; it is parsed, never evaluated."""
    parts = str(text).strip(" ()[]").split(",")
    try:
        read, write = (int(part) for part in parts)
    except ValueError:
        read = write = 0
    if read < 1 or write < 1:
        raise ConversionError(f"{where}: stream_params is {text!r}, expected '(R,W)' with two positive integers")
    return read, write


def speech_encoder(sources: dict[str, Source], prefix: str, where: Path | str, heads: int | None = None) -> SpeechEncoderConfig:
    """The encoder's dimensions from its tensors (OpenAI names). Whisper's heads are 64 wide unless the file says otherwise."""
    try:
        width, mels, _ = sources[prefix + "conv1.weight"].shape
        frames = sources[prefix + "positional_embedding"].shape[0]
    except KeyError as error:
        raise ConversionError(f"{where} has no speech encoder: {error} is missing") from None
    layers = len({name for name in sources if name.startswith(prefix + "blocks.") and name.endswith("attn.query.weight")})
    return SpeechEncoderConfig(mels=mels, frames=frames, width=width, layers=layers, heads=heads or max(1, width // 64))


def tokens(config: dict, generation: dict, speech: int, sep: int) -> TokenConfig:
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    unit_eos = config["speech_generator"]["eos_token_id"]
    return TokenConfig(
        speech=speech, text_eos=tuple(eos) if isinstance(eos, list) else (eos,), sep=sep, unit_eos=unit_eos, pad=config.get("bos_token_id")
    )


def omni2(directory: Path, sources: dict[str, Source]) -> Omni2Config:
    """The language side of a LLaMA-Omni2 release directory."""
    path = directory / "config.json"
    config = read_json(path)
    if config.get("model_type") != OMNI2:
        raise ConversionError(f"{path}: model_type is {config.get('model_type')!r}, expected '{OMNI2}' (a speech-to-speech LLaMA-Omni2 release)")
    for key, expected in {"speech_encoder_type": "whisper", "speech_projector_type": "linear"}.items():
        if config.get(key, expected) != expected:
            raise ConversionError(f"{path}: {key} is {config[key]!r}, expected '{expected}'")
    read, write = stream_params(config.get("stream_params"), path)
    return Omni2Config()

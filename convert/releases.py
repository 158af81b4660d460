"""What a release directory says about itself: config.json, generation_config.json, tokenizer ids and shards -> our configuration."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from convert.engine import ConversionError, Source
from convert.sources import safetensors, torch_dims
from omni2_jax import tokenizer
from omni2_jax.config import AdapterConfig, FlowConfig, HiftConfig, Omni2Config, Qwen2Config, SpeechEncoderConfig, TokenConfig

OMNI2 = "omni2_speech2s_qwen2"
DECODER_FILES = ("cosyvoice.yaml", "cosyvoice2.yaml", "flow.yaml")
NOTHING = Omni2Config().only()


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


def speech_encoder(sources: Mapping[str, Source], prefix: str, where: Path | str, heads: int | None = None) -> SpeechEncoderConfig:
    """The encoder's dimensions from its tensors (OpenAI names). Whisper's heads are 64 wide unless the file says otherwise."""
    try:
        width, mels, _ = sources[prefix + "conv1.weight"].shape
        frames = sources[prefix + "positional_embedding"].shape[0]
    except KeyError as error:
        raise ConversionError(f"{where} has no speech encoder: {error} is missing") from None
    layers = len({name for name in sources if name.startswith(prefix + "blocks.") and name.endswith("attn.query.weight")})
    return SpeechEncoderConfig(mels=mels, frames=frames, width=width, layers=layers, heads=heads or max(1, width // 64))


def omni2(directory: Path, sources: Mapping[str, Source], whisper: Path | None = None) -> Omni2Config:
    """The language side of a LLaMA-Omni2 release directory (no decoder)."""
    path = directory / "config.json"
    config, generation = read_json(path), directory / "generation_config.json"
    if config.get("model_type") != OMNI2:
        raise ConversionError(f"{path}: model_type is {config.get('model_type')!r}, expected '{OMNI2}' (a LLaMA-Omni2 speech-to-speech release)")
    for key, expected in {"speech_encoder_type": "whisper", "speech_projector_type": "linear"}.items():
        if config.get(key, expected) != expected:
            raise ConversionError(f"{path}: {key} is {config[key]!r}, expected '{expected}'")
    if not isinstance(config.get("speech_generator"), dict):
        raise ConversionError(f"{path} has no speech_generator: this is a speech-to-text model")
    read, write = stream_params(config.get("stream_params"), path)
    eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    units = config.get("unit_vocab_size", 6561)
    sep = added_token(directory / "tts_tokenizer", "<sep>")
    speech_lm = qwen2(config["speech_generator"], path)
    if speech_lm.vocabulary < sep + 1 + units:
        raise ConversionError(f"{directory}: <sep> is {sep} and {units} units follow it, but the speech LM has {speech_lm.vocabulary} tokens")
    adapter = sources.get("model.speech_projector.linear1.weight")
    return Omni2Config(
        llm=qwen2(config, path),
        speech_encoder=speech_encoder(sources, "model.speech_encoder.", directory, whisper_heads(directory, config, whisper)),
        adapter=AdapterConfig(stride=config.get("speech_encoder_ds_rate", 5), hidden=adapter.shape[0] if adapter else AdapterConfig.hidden),
        speech_lm=speech_lm,
        flow=None,
        hift=None,
        speaker=None,
        tokens=TokenConfig(
            speech=added_token(directory, "<speech>"),
            text_eos=tuple(eos) if isinstance(eos, list) else (eos,),
            sep=sep,
            unit_eos=config["speech_generator"]["eos_token_id"],
        ),
        units=units,
        read=read,
        write=write,
        max_prompt=config.get("tokenizer_model_max_length", 4096),
    )


def added_token(directory: Path, token: str) -> int:
    """The id of a special token in a tokenizer directory; raises when it is not there."""
    vocabulary = tokenizer.load(directory).get_vocab()
    if token not in vocabulary:
        raise ConversionError(f"the tokenizer in {directory} has no {token}")
    return vocabulary[token]


def whisper_heads(directory: Path, config: dict, whisper: Path | None) -> int | None:
    """Attention heads as the Whisper .pt beside the release (or given) says; None where there is none."""
    path = whisper if whisper and whisper.is_file() else directory / config.get("speech_encoder", "")
    return torch_dims(path).get("n_audio_head") if path.is_file() else None


def qwen_directory(directory: Path) -> Omni2Config:
    """A plain Hugging Face Qwen2.5 directory: an LLM and nothing else, what stage I(a) starts from."""
    config = read_json(directory / "config.json")
    eos = config.get("eos_token_id")
    tokens = TokenConfig(text_eos=tuple(eos) if isinstance(eos, list) else (eos,))
    return NOTHING.replace(llm=qwen2(config, directory / "config.json"), tokens=tokens)


class TagFree(yaml.SafeLoader):
    """A YAML loader that reads hyperpyyaml's `!new:`, `!name:`, `!ref` and `!apply:` nodes as plain values, instantiating nothing."""


def plain(loader: yaml.SafeLoader, _: str, node: yaml.Node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value


TagFree.add_multi_constructor("!", plain)


def decoder(directory: Path) -> tuple[FlowConfig, HiftConfig, Path]:
    """Flow and vocoder dimensions of a decoder directory, and the yaml file that states them."""
    path = next((directory / name for name in DECODER_FILES if (directory / name).exists()), None)
    if path is None:
        raise ConversionError(f"{directory} has none of {', '.join(DECODER_FILES)}")
    try:
        settings = yaml.load(path.read_text(), TagFree)
        flow, hift = settings["flow"], settings["hift"]
        refused = [f"{name} is {given!r}, expected {wanted!r}" for name, given, wanted in fixed(flow) if given != wanted]
        if refused:
            raise ConversionError(f"{path}: {'; '.join(refused)}")
        return flow_config(flow), hift_config(hift, settings["sample_rate"]), path
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConversionError(f"{path} is not a CosyVoice2 decoder configuration: {error!r}") from None


def fixed(flow: dict) -> list[tuple[str, object, object]]:
    """(name, value in the file, the only value that CosyVoice2 and our flow know)."""
    encoder, estimator = flow["encoder"], flow["decoder"]["estimator"]
    return [
        ("flow.input_frame_rate", flow["input_frame_rate"], 25),
        ("flow.encoder.input_size", encoder["input_size"], encoder["output_size"]),
        ("flow.encoder.use_cnn_module", encoder["use_cnn_module"], False),
        ("flow.encoder.macaron_style", encoder["macaron_style"], False),
        ("flow.encoder.normalize_before", encoder["normalize_before"], True),
        ("flow.encoder.pos_enc_layer_type", encoder["pos_enc_layer_type"], "rel_pos_espnet"),
        ("flow.decoder.t_scheduler", flow["decoder"]["cfm_params"]["content"]["t_scheduler"], "cosine"),
        ("flow.decoder.estimator.channels", len(estimator["channels"]), 1),
        ("flow.decoder.estimator.act_fn", estimator["act_fn"], "gelu"),
        ("flow.decoder.in_channels", flow["decoder"]["in_channels"], 3 * flow["output_size"]),
    ]


def flow_config(flow: dict) -> FlowConfig:
    encoder, estimator, cfm = flow["encoder"], flow["decoder"]["estimator"], flow["decoder"]["cfm_params"]["content"]
    return FlowConfig(
        units=flow["vocab_size"],
        width=encoder["output_size"],
        heads=encoder["attention_heads"],
        hidden=encoder["linear_units"],
        layers=encoder["num_blocks"],
        mels=flow["output_size"],
        speaker=flow["spk_embed_dim"] if isinstance(flow["spk_embed_dim"], int) else FlowConfig.speaker,
        upsample=flow["token_mel_ratio"],
        lookahead=flow["pre_lookahead_len"],
        chunk=2 * flow["input_frame_rate"],  # what the released decoder sets, whatever the file says
        channels=estimator["channels"][0],
        estimator_heads=estimator["num_heads"],
        estimator_head_size=estimator["attention_head_dim"],
        blocks=estimator["n_blocks"],
        mid_blocks=estimator["num_mid_blocks"],
        guidance=float(cfm["inference_cfg_rate"]),
        guidance_dropout=float(cfm["training_cfg_rate"]),
        sigma_min=float(cfm["sigma_min"]),
    )


def hift_config(hift: dict, sample_rate: int) -> HiftConfig:
    return HiftConfig(
        mels=hift["in_channels"],
        channels=hift["base_channels"],
        harmonics=hift["nb_harmonics"],
        sample_rate=sample_rate,
        sine_amplitude=hift["nsf_alpha"],
        noise_deviation=hift["nsf_sigma"],
        voiced_threshold=hift["nsf_voiced_threshold"],
        upsample=tuple(hift["upsample_rates"]),
        upsample_kernels=tuple(hift["upsample_kernel_sizes"]),
        n_fft=hift["istft_params"]["n_fft"],
        hop=hift["istft_params"]["hop_len"],
        resblock_kernels=tuple(hift["resblock_kernel_sizes"]),
        resblock_dilations=tuple(map(tuple, hift["resblock_dilation_sizes"])),
        source_kernels=tuple(hift["source_resblock_kernel_sizes"]),
        source_dilations=tuple(map(tuple, hift["source_resblock_dilation_sizes"])),
        slope=hift["lrelu_slope"],
        limit=hift["audio_limit"],
        f0_channels=hift["f0_predictor"]["cond_channels"],
    )


def whisper_directory(directory: Path) -> SpeechEncoderConfig:
    """The encoder of a Hugging Face Whisper directory."""
    path = directory / "config.json"
    config = read_json(path)
    if config.get("model_type") != "whisper":
        raise ConversionError(f"{path}: model_type is {config.get('model_type')!r}, expected 'whisper'")
    return SpeechEncoderConfig(
        mels=config["num_mel_bins"],
        frames=config["max_source_positions"],
        width=config["d_model"],
        layers=config["encoder_layers"],
        heads=config["encoder_attention_heads"],
    )


def hugging_face(config: Qwen2Config, eos: int | list[int]) -> dict:
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
    speech_lm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype, "bos_token_id": config.tokens.unit_eos}
    return {
        "architectures": ["Omni2Speech2SQwen2ForCausalLM"],
        "model_type": OMNI2,
        "torch_dtype": dtype,
        "speech_encoder": "models/speech_encoder/large-v3.pt",
        "speech_encoder_type": "whisper",
        "speech_encoder_hidden_size": config.speech_encoder.width,
        "speech_encoder_ds_rate": config.adapter.stride,
        "speech_projector_type": "linear",
        "stream_params": f"({config.read},{config.write})",
        "unit_vocab_size": config.units,
        "tokenizer_model_max_length": config.max_prompt,
        "tokenizer_padding_side": "right",
        "speech_generator": speech_lm | hugging_face(config.speech_lm, config.tokens.unit_eos),
    } | hugging_face(config.llm, eos[0] if len(eos) == 1 else list(eos))

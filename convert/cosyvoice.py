"""What a cosy2_decoder directory's yaml says about flow and vocoder -> our configuration."""

import re
from pathlib import Path

import yaml

from omni2_jax.config import FlowConfig, HiftConfig
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.releases import checked

FILES = ("cosyvoice.yaml", "cosyvoice2.yaml", "flow.yaml")


class TagFree(yaml.SafeLoader):
    """A YAML loader that reads hyperpyyaml's `!new:`, `!name:`, `!ref` and `!apply:` nodes as plain values, instantiating nothing."""


def plain(loader: yaml.SafeLoader, _: str, node: yaml.Node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return (
        loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.SequenceNode)
        else node.value
    )


TagFree.add_multi_constructor("!", plain)


def resolved(value, settings: dict):
    """The value with what its `!ref <name>` nodes refer to, the top of the file."""
    match value:
        case dict():
            return {key: resolved(part, settings) for key, part in value.items()}
        case list():
            return [resolved(part, settings) for part in value]
        case str() if name := re.fullmatch(r"<(\w+)>", value):
            return settings[name[1]]
    return value


def read(directory: Path) -> tuple[FlowConfig, HiftConfig, Path]:
    """Flow and vocoder dimensions of a decoder directory, and the yaml file that states them."""
    path = next((directory / name for name in FILES if (directory / name).exists()), None)
    if path is None:
        raise ConversionError(f"{directory} has none of {', '.join(FILES)}")
    try:
        settings = yaml.load(path.read_text(), TagFree)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    try:
        flow, hift = (resolved(settings[part], settings) for part in ("flow", "hift"))
        refused = [
            f"{name} is {given!r}, expected {wanted!r}"
            for name, given, wanted in fixed(flow)
            if given != wanted
        ]
        flow_fields, hift_fields = flow_dimensions(flow), hift_dimensions(hift)
    except (KeyError, TypeError, IndexError) as error:
        raise ConversionError(
            f"{path} is not a CosyVoice2 decoder configuration: {error!r}"
        ) from None
    if refused:
        raise ConversionError(f"{path}: {'; '.join(refused)}")
    return checked(FlowConfig, path, **flow_fields), checked(HiftConfig, path, **hift_fields), path


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
        (
            "flow.decoder.t_scheduler",
            flow["decoder"]["cfm_params"]["content"]["t_scheduler"],
            "cosine",
        ),
        ("flow.decoder.estimator.channels", len(estimator["channels"]), 1),
        ("flow.decoder.estimator.act_fn", estimator["act_fn"], "gelu"),
        ("flow.decoder.in_channels", flow["decoder"]["in_channels"], 3 * flow["output_size"]),
    ]


def flow_dimensions(flow: dict) -> dict:
    encoder, estimator, cfm = (
        flow["encoder"],
        flow["decoder"]["estimator"],
        flow["decoder"]["cfm_params"]["content"],
    )
    return dict(
        units=flow["vocab_size"],
        width=encoder["output_size"],
        heads=encoder["attention_heads"],
        hidden=encoder["linear_units"],
        layers=encoder["num_blocks"],
        mels=flow["output_size"],
        speaker=flow["spk_embed_dim"],
        upsample=flow["token_mel_ratio"],
        lookahead=flow["pre_lookahead_len"],
        chunk=2
        * flow["input_frame_rate"],  # what the released decoder sets, whatever the file says
        channels=estimator["channels"][0],
        estimator_heads=estimator["num_heads"],
        estimator_head_size=estimator["attention_head_dim"],
        blocks=estimator["n_blocks"],
        mid_blocks=estimator["num_mid_blocks"],
        guidance=cfm["inference_cfg_rate"],
        guidance_dropout=cfm["training_cfg_rate"],
        sigma_min=cfm["sigma_min"],
    )


def hift_dimensions(hift: dict) -> dict:
    return dict(
        mels=hift["in_channels"],
        channels=hift["base_channels"],
        harmonics=hift["nb_harmonics"],
        sample_rate=hift["sampling_rate"],
        sine_amplitude=hift["nsf_alpha"],
        noise_deviation=hift["nsf_sigma"],
        voiced_threshold=hift["nsf_voiced_threshold"],
        upsample=hift["upsample_rates"],
        upsample_kernels=hift["upsample_kernel_sizes"],
        n_fft=hift["istft_params"]["n_fft"],
        hop=hift["istft_params"]["hop_len"],
        resblock_kernels=hift["resblock_kernel_sizes"],
        resblock_dilations=hift["resblock_dilation_sizes"],
        source_kernels=hift["source_resblock_kernel_sizes"],
        source_dilations=hift["source_resblock_dilation_sizes"],
        slope=hift["lrelu_slope"],
        limit=hift["audio_limit"],
        f0_channels=hift["f0_predictor"]["cond_channels"],
    )

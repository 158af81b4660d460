"""Writes the yaml of a decoder that comes from no release: the inverse of `cosyvoice.read`.

The tags name the classes of CosyVoice that the released code builds.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from omni2_jax.config import FlowConfig, HiftConfig
from omni2_jax.convert import cosyvoice, vocoders
from omni2_jax.convert.plan import ConversionError

FILE = "cosyvoice.yaml"
UNSTATED = ("noise_frames",)  # no release holds the noise
TAGS = {  # dotted path -> the class of the released code that stands there
    "flow": "!new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec",
    "flow.encoder": "!new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder",
    "flow.decoder": "!new:cosyvoice.flow.flow_matching.CausalConditionalCFM",
    "flow.decoder.cfm_params": "!new:omegaconf.DictConfig",
    "flow.decoder.estimator": "!new:cosyvoice.flow.decoder.ConditionalDecoder",
    "hift": "!new:cosyvoice.hifigan.generator.HiFTGenerator",
    "hift.f0_predictor": "!new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
}
CONSTANTS = cosyvoice.FIXED | {  # arguments of these classes that are the same in every model
    "flow.output_type": "mel",
    "flow.only_mask_loss": True,
    "flow.encoder.input_layer": "linear",
    "flow.encoder.selfattention_layer_type": "rel_selfattn",
    "flow.decoder.n_spks": 1,
    "flow.decoder.cfm_params.content.solver": "euler",
    "flow.decoder.cfm_params.content.reg_loss_type": "l1",
    "flow.decoder.estimator.causal": True,
    "flow.decoder.estimator.dropout": 0.0,
    "hift.f0_predictor.num_class": 1,
}


class Dumper(yaml.SafeDumper):
    """A YAML dumper that repeats equal values instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Tagged(dict):
    """An empty mapping with a tag."""

    def __init__(self, tag: str):
        super().__init__()
        self.tag = tag


Dumper.add_representer(
    Tagged, lambda dumper, value: dumper.represent_mapping(value.tag, dict(value))
)


def write(path: Path, flow: FlowConfig, vocoder: HiftConfig) -> None:
    """Write the yaml of these dimensions.

    Raises ConversionError if the released layout cannot hold one of them.
    """
    fields = vocoders.of_config(vocoder).FIELDS
    check("flow", flow, cosyvoice.FLOW)
    check("vocoder", vocoder, fields)
    stated = {path: getattr(flow, name) for name, path in cosyvoice.FLOW.items()}
    stated |= {path: getattr(vocoder, name) for name, path in fields.items()}
    derived = {
        "flow.input_size": flow.width,
        "flow.encoder.input_size": flow.width,
        "flow.decoder.spk_emb_dim": flow.mels,
        "flow.decoder.in_channels": 3 * flow.mels,
        "flow.decoder.estimator.in_channels": 4 * flow.mels,
        "flow.decoder.estimator.out_channels": flow.mels,
        "hift.f0_predictor.in_channels": vocoder.mels,
    }
    channels = {
        "flow.decoder.estimator.channels": [stated.pop("flow.decoder.estimator.channels.0")]
    }
    content: dict[str, Any] = {"sample_rate": vocoder.sample_rate}
    for name, value in (stated | derived | channels | CONSTANTS).items():
        put(content, name, value)
    path.write_text(yaml.dump(content, Dumper=Dumper, sort_keys=False))


def check(part: str, config: Any, stated: Mapping[str, str]) -> None:
    """Raise ConversionError if a setting that no yaml states is not the released one."""
    for field in dataclasses.fields(config):
        if field.name in stated or field.name in UNSTATED:
            continue
        value, released = getattr(config, field.name), getattr(type(config)(), field.name)
        if value != released:
            raise ConversionError(
                f"{part}.{field.name} is {value}, but the released layout holds {released} only"
            )


def put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, with the mappings that lead to it."""
    *names, last = path.split(".")
    for depth, name in enumerate(names, 1):
        if name not in content:
            tag = TAGS.get(".".join(names[:depth]))
            content[name] = Tagged(tag) if tag else {}
        content = content[name]
    content[last] = plain(value)


def plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value

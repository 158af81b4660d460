"""What the yaml of a cosy2_decoder directory says about flow and vocoder -> our configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omni2_jax.config import FlowConfig, HiftConfig
from omni2_jax.convert import vocoders
from omni2_jax.convert.json_files import checked, regular_file, short
from omni2_jax.convert.plan import ConversionError

FILES = ("cosyvoice.yaml", "cosyvoice2.yaml", "flow.yaml")
MAX_BYTES = 2**20  # the released file has 9 KB
FRAME_RATE = 25  # units a second
UNITS_A_CHUNK = 2 * FRAME_RATE  # what the released decoder sets, whatever the file says

FLOW = {  # field of FlowConfig -> where the yaml states it
    "units": "flow.vocab_size",
    "width": "flow.encoder.output_size",
    "heads": "flow.encoder.attention_heads",
    "hidden": "flow.encoder.linear_units",
    "layers": "flow.encoder.num_blocks",
    "mels": "flow.output_size",
    "speaker": "flow.spk_embed_dim",
    "upsample": "flow.token_mel_ratio",
    "lookahead": "flow.pre_lookahead_len",
    "channels": "flow.decoder.estimator.channels.0",
    "estimator_heads": "flow.decoder.estimator.num_heads",
    "estimator_head_size": "flow.decoder.estimator.attention_head_dim",
    "blocks": "flow.decoder.estimator.n_blocks",
    "mid_blocks": "flow.decoder.estimator.num_mid_blocks",
    "guidance": "flow.decoder.cfm_params.content.inference_cfg_rate",
    "guidance_dropout": "flow.decoder.cfm_params.content.training_cfg_rate",
    "sigma_min": "flow.decoder.cfm_params.content.sigma_min",
}
FIXED = {  # the only values that our flow has
    "flow.input_frame_rate": FRAME_RATE,
    "flow.encoder.use_cnn_module": False,
    "flow.encoder.macaron_style": False,
    "flow.encoder.normalize_before": True,
    "flow.encoder.pos_enc_layer_type": "rel_pos_espnet",
    "flow.decoder.cfm_params.content.t_scheduler": "cosine",
    "flow.decoder.estimator.act_fn": "gelu",
}


class PlainLoader(yaml.SafeLoader):
    """A YAML loader that builds plain values only and follows no aliases.

    hyperpyyaml's `!new:`, `!name:`, `!ref` and `!apply:` nodes are read as what stands behind the
    tag; nothing is called. Aliases, which could make a small file huge, raise YAMLError.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)


def plain(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    """The value of a node without its tag."""
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


PlainLoader.add_multi_constructor("!", plain)


@dataclass(frozen=True)
class Settings:
    """The content of a yaml file, read by dotted paths; `!ref <name>` leads to the file's top."""

    content: Mapping[str, Any]

    def __getitem__(self, path: str) -> Any:
        """The value at `path`. Raises KeyError, TypeError or IndexError if there is none."""
        value: Any = self.content
        for name in path.split("."):
            value = self.follow(value[int(name) if isinstance(value, list) else name])
        return value

    def fields(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """Field -> the value at its path. Raises what `settings[path]` raises."""
        return {field: self[path] for field, path in paths.items()}

    def follow(self, value: Any) -> Any:
        """The value, or what it refers to; in a list every item is followed."""
        if isinstance(value, list):
            return [self.follow(item) for item in value]
        if isinstance(value, str) and (name := re.fullmatch(r"<(\w+)>", value)):
            return self.content[name[1]]
        return value


def load(path: Path) -> Settings:
    """A yaml file as `Settings`. Raises ConversionError if it cannot be read."""
    try:
        if (size := regular_file(path).stat().st_size) > MAX_BYTES:
            raise ConversionError(f"{path} has {size} bytes, expected {MAX_BYTES} at most")
        return Settings(yaml.load(path.read_text(), PlainLoader))
    except ConversionError:
        raise
    except RecursionError:
        raise ConversionError(f"cannot read {path}: it is nested too deeply") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConversionError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None


def read(directory: Path) -> tuple[FlowConfig, HiftConfig, Path]:
    """Flow and vocoder dimensions of a decoder directory, and the yaml file that states them.

    Raises ConversionError if there is no such file, if it is not CosyVoice2's, or if it asks for
    something that our flow does not have.
    """
    path = next((directory / name for name in FILES if (directory / name).exists()), None)
    if path is None:
        raise ConversionError(f"{directory} has none of {', '.join(FILES)}")
    settings = load(path)
    try:
        refused = unsupported(settings)
        flow = settings.fields(FLOW) | {"chunk": UNITS_A_CHUNK}
        vocoder = vocoders.of_yaml(settings.content)
        vocoder_fields = settings.fields(vocoder.FIELDS)
    except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} is not a CosyVoice2 decoder configuration: {error!r}"
        ) from None
    if refused:
        raise ConversionError(f"{path}: {'; '.join(refused)}")
    return (
        checked(FlowConfig, path, flow, FLOW),
        checked(vocoder.CONFIG, path, vocoder_fields, vocoder.FIELDS),
        path,
    )


def unsupported(settings: Settings) -> list[str]:
    """What the file asks for and our flow does not have, in words."""
    expected = FIXED | {
        "flow.encoder.input_size": settings["flow.encoder.output_size"],
        "flow.decoder.in_channels": 3 * settings["flow.output_size"],
    }
    faults = [
        f"{path} is {short.repr(settings[path])}, expected {value!r}"
        for path, value in expected.items()
        if settings[path] != value
    ]
    channels = settings["flow.decoder.estimator.channels"]
    if len(channels) != 1:
        faults.append(f"flow.decoder.estimator.channels is {short.repr(channels)}, expected one")
    return faults

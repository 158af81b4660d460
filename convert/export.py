"""A checkpoint -> the released PyTorch layout.

OUT/LLaMA-Omni2: safetensors, tokenizers, config.json. OUT/cosy2_decoder: flow.pt, the vocoder's
file, spk2info.pt and the yaml.
"""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from safetensors import SafetensorError
from safetensors.numpy import save_file

from omni2_jax import files, remote
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.config import LANGUAGE_PARTS, DecoderConfig, Omni2Config
from omni2_jax.console import say
from omni2_jax.convert import (
    cosyvoice,
    decoder_yaml,
    families,
    json_files,
    vocabulary,
    vocoders,
)
from omni2_jax.convert.families import qwen2
from omni2_jax.convert.formats import reason
from omni2_jax.convert.hugging_face import HEADS, OMNI2
from omni2_jax.convert.plan import ConversionError, Table, unplan
from omni2_jax.convert.precision import quantized_parts
from omni2_jax.convert.tables import flow, omni2

SHARD_BYTES = 2 * 2**30  # also bounds the host memory of an export
DECODER_ALONE = "to write its decoder, make a checkpoint of it with omni2 join decoder=CKPT"


def write(directory: Path, out: Path, progress: rich.progress.Progress) -> None:
    """Write the checkpoint `directory` in the released layout as `out`, whole or not at all.

    Raises ConversionError if it holds neither a whole language side nor a decoder, or a language
    side that is not whole, if the released layout cannot hold one of its parts, or if it is damaged
    or in Cloud Storage; ValueError if `out` cannot be written.
    """
    if remote.is_remote(directory):
        raise ConversionError(f"{directory} is in Cloud Storage; copy it to this machine first")
    config, present = Omni2Config.load(directory / "config.json"), parameters.parts(directory)
    language = all(part in present for part in LANGUAGE_PARTS)
    check_fusion(directory, config, present)
    if not language and "flow" not in present:
        raise ConversionError(
            f"{directory} holds {', '.join(present) or 'no parameters'}: "
            "neither a whole LLaMA-Omni2 nor its decoder"
        )
    check_language(directory, present)
    if "flow" in present and "vocoder" not in present:
        raise ConversionError(
            f"{directory} has a flow and no vocoder; the released layout holds both or neither"
        )
    if language:
        check_families(directory, config)
    with files.atomic_directory(out) as partial:
        if language:
            write_omni2(directory, config, partial / "LLaMA-Omni2", progress)
        if "flow" in present:
            write_decoder(directory, config, partial / "cosy2_decoder", progress)


def check_fusion(directory: Path, config: Omni2Config, present: Collection[str]) -> None:
    """Raise ConversionError if the speech LM's input is not what the released code gives it."""
    if {"llm", "speech_lm"} <= set(present) and config.mix != "gate":
        advice = f"; {DECODER_ALONE}" if "flow" in present else ""
        raise ConversionError(
            f'{directory}: its mix is "{config.mix}", but the released model has gate fusion only, '
            f"so its language side cannot be written with --to-torch{advice}"
        )


def check_language(directory: Path, present: Collection[str]) -> None:
    """Raise ConversionError if some parts of the language side are there and others are not."""
    absent = [part for part in LANGUAGE_PARTS if part not in present]
    if absent and len(absent) < len(LANGUAGE_PARTS):
        raise ConversionError(
            f"{directory} lacks {', '.join(absent)}; the released layout holds the whole language "
            f"side ({', '.join(LANGUAGE_PARTS)}) or nothing of it; {DECODER_ALONE}"
        )


def check_families(directory: Path, config: Omni2Config) -> None:
    """Raise ConversionError unless both language models are Qwen2, all that a release can be."""
    if quantized := quantized_parts(config):
        raise ConversionError(
            f"{directory}: {', '.join(quantized)} has int8 weights, which the released layout "
            "cannot hold; export the checkpoint that was quantized"
        )
    for part in ("llm", "speech_lm"):
        lm: DecoderConfig = getattr(config, part)
        if not qwen2.holds(lm):
            family = families.of_decoder(lm)
            raise ConversionError(
                f"{directory}: its {part} is a {family.NAME if family else 'model of no family'}, "
                "but the released layout and code hold Qwen2.5 only, so this checkpoint cannot be "
                "written with --to-torch"
            )


def tensors(
    directory: Path, table: Table, progress: rich.progress.Progress, label: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The source tensors of a table; one parameter is in memory at a time.

    The table's targets start with the part's name. Raises ConversionError if the checkpoint lacks
    one of them.
    """
    parts = dict.fromkeys(rule.target.partition(".")[0] for rule in table.rules)
    leaves = {
        f"{part}.{path}": leaf
        for part in parts
        for path, leaf in parameters.stored(directory, part).items()
    }
    absent = [rule.target for rule in table.rules if rule.target not in leaves]
    if absent:
        raise ConversionError(
            f"{directory} does not fit its config.json: it lacks {', '.join(absent[:10])}"
        )
    task = progress.add_task(label, total=sum(leaf.nbytes for leaf in leaves.values()))

    def read(path: str) -> np.ndarray:
        value = leaves[path].read()
        progress.advance(task, value.nbytes)
        return value

    yield from unplan(table, read)


class SafetensorsWriter:
    """Writes tensors into safetensors files of at most SHARD_BYTES, named as Hugging Face does.

    `add` every tensor, then `close`: the names have the number of files in them, so the files get
    them last. Both raise ConversionError if a file cannot be written.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.waiting: dict[str, np.ndarray] = {}  # tensors of the next file
        self.waiting_bytes = 0
        self.total_bytes = 0
        self.names: list[list[str]] = []  # tensors of every file
        self.dtypes: set[str] = set()

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Keep a tensor, and write a file when it is full."""
        if self.waiting and self.waiting_bytes + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.waiting[name] = tensor
        self.waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.dtypes.add(tensor.dtype.name)

    def flush(self) -> None:
        """Write the tensors that wait as one file."""
        self.names.append(list(self.waiting))
        file = self.directory / f"shard-{len(self.names)}"
        with writing(file):
            save_file(self.waiting, file, metadata={"format": "pt"})
        self.waiting, self.waiting_bytes = {}, 0

    def close(self) -> None:
        """Write the rest, name the files, and write their index if there are several."""
        self.flush()
        count = len(self.names)
        if count == 1:
            (self.directory / "shard-1").rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self.names, 1):
            file = f"model-{i:05d}-of-{count:05d}.safetensors"
            (self.directory / f"shard-{i}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.directory / "model.safetensors.index.json", index)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_omni2(
    directory: Path, config: Omni2Config, out: Path, progress: rich.progress.Progress
) -> None:
    """Write the language side into the new directory `out`. Raises ConversionError as `write`."""
    out.mkdir()
    writer = SafetensorsWriter(out)
    for name, tensor in tensors(directory, omni2.table(config), progress, "language side"):
        writer.add(name, tensor)
    writer.close()
    dtype = writer.dtypes.pop() if len(writer.dtypes) == 1 else "float32"
    original = directory / "assets" / "config.json"
    stated = json_files.read(original) if original.exists() else {}
    write_json(out / "config.json", release_json(config, dtype, stated))
    write_tokenizers(directory, config, out)
    if (directory / "generation_config.json").exists():
        shutil.copyfile(directory / "generation_config.json", out / "generation_config.json")


def write_tokenizers(directory: Path, config: Omni2Config, out: Path) -> None:
    """Write both tokenizers; a checkpoint from nothing does not list the units of the second."""
    shutil.copytree(directory / "tokenizer", out, dirs_exist_ok=True)
    if (directory / "tts_tokenizer").exists():
        shutil.copytree(directory / "tts_tokenizer", out / "tts_tokenizer")
        return
    (out / "tts_tokenizer").mkdir()
    plain = vocabulary.read(directory / "tokenizer")
    for name, file in vocabulary.with_units(plain, config.units).items():
        content = file if isinstance(file, bytes) else file.read_bytes()
        (out / "tts_tokenizer" / name).write_bytes(content)


def release_json(config: Omni2Config, dtype: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a LLaMA-Omni2 release; `config` must have the language side.

    stated: the file of the release that the checkpoint was made of, or nothing. It keeps what is
    not in `config`, such as the Whisper file's path.
    """
    llm, speech_lm = config.llm, config.speech_lm
    encoder, adapter = config.speech_encoder, config.adapter
    assert llm and speech_lm and encoder and adapter
    eos = config.tokens.text_eos
    default = {
        "architectures": ["Omni2Speech2SQwen2ForCausalLM"],
        "model_type": OMNI2,
        "torch_dtype": dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "speech_encoder": "models/speech_encoder/large-v3.pt",
        "speech_encoder_type": "whisper",
        "speech_projector_type": "linear",
        "tokenizer_padding_side": "right",
    }
    dimensions = qwen2.write_config(llm) | {
        "speech_encoder_hidden_size": encoder.width,
        HEADS: encoder.heads,
        "speech_encoder_ds_rate": adapter.stride,
        "stream_params": f"({config.read},{config.write})",
        "unit_vocab_size": config.units,
        "tokenizer_model_max_length": config.max_prompt,
        "speech_generator": generator_json(
            speech_lm, config.tokens.unit_eos, dtype, stated.get("speech_generator", {})
        ),
    }
    return {**default, **stated, **dimensions}


def generator_json(
    config: DecoderConfig, eos: int, dtype: str, stated: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The speech LM in a release's config.json.

    stated: the entry of the release itself. It is kept as it is if its dimensions are `config`.
    """
    context = "assets/config.json: speech_generator"
    if stated.get("eos_token_id") == eos and qwen2.read_config(stated, context) == config:
        return stated
    default = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": dtype,
        "bos_token_id": eos,
    }
    return {**default, **stated, **qwen2.write_config(config), "eos_token_id": eos}


def write_decoder(
    directory: Path, config: Omni2Config, out: Path, progress: rich.progress.Progress
) -> None:
    """Write flow, vocoder and voices into the new directory `out`. Raises as `write`."""
    import torch

    assert config.flow is not None and config.vocoder is not None
    out.mkdir()
    assets = [path for path in directory.glob("assets/*") if path.name != "config.json"]
    if not any(path.name in cosyvoice.FILES for path in assets):
        decoder_yaml.write(out / decoder_yaml.FILE, config.flow, config.vocoder)
    vocoder = vocoders.of_config(config.vocoder)
    tables = {
        "flow.pt": flow.table().at("", "flow."),
        vocoder.FILE: vocoder.table(config.vocoder).at("", "vocoder."),
    }
    for name, table in tables.items():
        state = {
            tensor_name: torch.from_numpy(tensor)
            for tensor_name, tensor in tensors(directory, table, progress, name)
        }
        with writing(out / name):
            torch.save(state, out / name)
    for asset in assets:
        shutil.copyfile(asset, out / asset.name)
    if config.speaker and not (out / "campplus.onnx").exists():
        say("speaker: a fresh one has no campplus.onnx and is left out")
    x_vectors = {
        name: {"embedding": torch.from_numpy(voices.resolve(directory, config, name))[None]}
        for name in voices.names(directory)
    }
    with writing(out / "spk2info.pt"):
        torch.save(x_vectors, out / "spk2info.pt")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConversionError where safetensors or torch cannot write `path`.

    They have their own kinds of error for it.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise ConversionError(f"cannot write {path}: {reason(error)}") from None

"""A checkpoint -> the released PyTorch layout: OUT/LLaMA-Omni2 (safetensors, tokenizers) and OUT/cosy2_decoder (flow.pt, hift.pt)."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.progress
from safetensors import SafetensorError
from safetensors.numpy import save_file

from omni2_jax import files
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.convert import releases
from omni2_jax.convert.formats import reason
from omni2_jax.convert.plan import ConversionError, Table, unplan
from omni2_jax.convert.tables import flow, hift, omni2

SHARD_BYTES = 2 * 2**30  # also bounds the host memory of an export


def write(directory: Path, out: Path, progress: rich.progress.Progress) -> None:
    """Write `out` whole or not at all. Raises ConversionError when the checkpoint holds neither a language side nor a decoder."""
    config, there = Omni2Config.load(directory / "config.json"), parameters.parts(directory)
    language = all(part in there for part in LANGUAGE_PARTS)
    if not language and "flow" not in there:
        raise ConversionError(
            f"{directory} holds {', '.join(there) or 'no parameters'}: neither a whole LLaMA-Omni2 nor its decoder"
        )
    with files.atomic_directory(out) as work:
        if language:
            write_omni2(directory, config, work / "LLaMA-Omni2", progress)
        if "flow" in there:
            write_decoder(directory, config, work / "cosy2_decoder", progress)


def tensors(
    directory: Path, table: Table, progress: rich.progress.Progress, label: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The source tensors of a table, one parameter in memory at a time; its targets start with the part's name."""
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


class Shards:
    """safetensors files of at most SHARD_BYTES, named as Hugging Face names them once their number is known."""

    def __init__(self, directory: Path):
        self.directory, self.waiting, self.size, self.total = directory, {}, 0, 0
        self.names: list[list[str]] = []
        self.dtypes: set[str] = set()

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self.waiting and self.size + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.waiting[name] = tensor
        self.size += tensor.nbytes
        self.total += tensor.nbytes
        self.dtypes.add(tensor.dtype.name)

    def flush(self) -> None:
        self.names.append(list(self.waiting))
        file = self.directory / f"shard-{len(self.names)}"
        with writing(file):
            save_file(self.waiting, file, metadata={"format": "pt"})
        self.waiting, self.size = {}, 0

    def close(self) -> None:
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
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n"
        )


def write_omni2(
    directory: Path, config: Omni2Config, out: Path, progress: rich.progress.Progress
) -> None:
    out.mkdir()
    shards = Shards(out)
    for name, tensor in tensors(directory, omni2.table(config), progress, "language side"):
        shards.add(name, tensor)
    shards.close()
    generated = releases.omni2_json(
        config, shards.dtypes.pop() if len(shards.dtypes) == 1 else "float32"
    )
    original = (
        directory / "assets" / "config.json"
    )  # keeps what we do not need, the Whisper file's path for one
    stated = releases.read_json(original) if original.exists() else {}
    content = {**generated, **stated, "stream_params": generated["stream_params"]}
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    for source, target in {"tokenizer": out, "tts_tokenizer": out / "tts_tokenizer"}.items():
        target.mkdir(exist_ok=True)
        for file in (directory / source).iterdir():
            shutil.copyfile(file, target / file.name)
    if (directory / "generation_config.json").exists():
        shutil.copyfile(directory / "generation_config.json", out / "generation_config.json")


def write_decoder(
    directory: Path, config: Omni2Config, out: Path, progress: rich.progress.Progress
) -> None:
    import torch

    out.mkdir()
    for part, table in {
        "flow": flow.table().at("", "flow."),
        "hift": hift.table(config.vocoder).at("", "vocoder."),
    }.items():
        state = {
            name: torch.from_numpy(tensor)
            for name, tensor in tensors(directory, table, progress, part)
        }
        with writing(out / f"{part}.pt"):
            torch.save(state, out / f"{part}.pt")
    for asset in (directory / "assets").iterdir():
        if asset.name != "config.json":
            shutil.copyfile(asset, out / asset.name)
    x_vectors = {
        name: {"embedding": torch.from_numpy(voices.resolve(directory, config, name))[None]}
        for name in voices.names(directory)
    }
    with writing(out / "spk2info.pt"):
        torch.save(x_vectors, out / "spk2info.pt")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """safetensors and torch have their own kinds of error for a file that cannot be written."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise ConversionError(f"cannot write {path}: {reason(error)}") from None

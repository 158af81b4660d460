"""Host memory of a conversion, measured by the process that converts a made-up release.

python -m benchmarks.convert_memory --size 0.5b    (--size tiny takes seconds)

The source is memory mapped, and the kernel evicts its pages as it likes; so the anonymous memory
is measured, as the growth over its size at the start.
"""

import json
import math
import multiprocessing
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer

from benchmarks import sizes
from benchmarks.sizes import SIZES
from omni2_jax.checkpoint import parameters, tokenizer
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.console import run_function
from omni2_jax.convert import read, write
from omni2_jax.convert.export import release_json
from omni2_jax.convert.plan import indices, source_shapes
from omni2_jax.convert.tables import omni2
from omni2_jax.models.model import abstract_model

TOKENIZERS = Path(__file__).parent.parent / "tests" / "goldens" / "omni2"


def tensors(config: Omni2Config) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names and shape of every tensor of a release with these dimensions.

    A tied head is a second name of the embedding.
    """
    table, leaves = omni2.table(config), parameters.flatten(abstract_model(config)[1])
    copies = {original: alias for alias, original in table.aliases.items()}
    for rule in table.rules:
        shape = leaves[rule.target].shape
        for index in indices(rule, shape):
            for name, size in zip(rule.names(index), source_shapes(rule, shape), strict=True):
                yield (name, copies[name]) if name in copies else (name,), size


def write_release(directory: Path, config: Omni2Config) -> None:
    """A release in one safetensors file of random bfloat16 numbers.

    They compress as little as real ones.
    """
    directory.mkdir()
    for source, target in (
        (TOKENIZERS, directory),
        (TOKENIZERS / "tts_tokenizer", directory / "tts_tokenizer"),
    ):
        target.mkdir(exist_ok=True)
        for name in filter(lambda name: (source / name).exists(), tokenizer.FILES):
            shutil.copyfile(source / name, target / name)
    (directory / "config.json").write_text(json.dumps(release_json(config, "bfloat16", {})))
    entries, sizes, end = {}, [], 0
    for names, shape in tensors(config):
        sizes.append((len(names), math.prod(shape)))
        for name in names:
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    random = np.random.default_rng(0)
    pool = random.standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for copies, size in sizes:
            tensor = np.resize(np.roll(pool, random.integers(pool.size)), size).tobytes()
            file.write(tensor * copies)


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def watched(release: Path, out: Path) -> dict[str, int]:
    """Convert a release and measure, in bytes, the anonymous memory of this process.

    Returns its size "before" the first tensor is read, its "peak", and the size of the "largest"
    parameter and of "all" of them.
    """
    planned = read.read_omni2(release)
    sizes = [leaf.nbytes for leaf in parameters.flatten(planned.params).values()]
    before, seen, over = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not over.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=sample)
    watcher.start()
    write.write(out, planned, {})
    over.set()
    watcher.join()
    return {"before": before, "peak": max(seen), "largest": max(sizes), "all": sum(sizes)}


def measure(config: Omni2Config) -> dict[str, int]:
    """`watched`, called in a new process, on a release of these dimensions."""
    with tempfile.TemporaryDirectory() as directory:
        release, out = Path(directory) / "release", Path(directory) / "checkpoint"
        write_release(release, config)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(watched, release, out).result()


def main(
    size: Annotated[str, typer.Option(help=f"Dimensions, one of {', '.join(SIZES)}.")] = "0.5b",
) -> None:
    """Measure how much memory a conversion takes beside what it reads and writes."""
    found = measure(sizes.of(size).only(*LANGUAGE_PARTS))
    for name, count in (found | {"above": found["peak"] - found["before"]}).items():
        print(f"{name:8} {count / 1e6:9.1f} MB")
    ratio = (found["peak"] - found["before"]) / found["largest"]
    print(f"peak above the start / largest parameter: {ratio:.2f}")


if __name__ == "__main__":
    run_function(main)

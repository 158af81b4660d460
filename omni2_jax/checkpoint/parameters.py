"""The parameters of a checkpoint: one Orbax (tensorstore) tree per part, each restorable alone.

CKPT/config.json  generation_config.json  tokenizer/  tts_tokenizer/  voices/NAME.npy  assets/
CKPT/params/PART/

A speech tokenizer, which makes training data, may be one more part, `speech_tokenizer`, with a
speech_tokenizer.json (see models/speech_tokenizer.py).

Every chunk of an array has a checksum, which is checked whenever it is read (see checksums.py).
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import remote, sharding
from omni2_jax.checkpoint import checksums
from omni2_jax.checkpoint.lazy import FILE_BYTES, LazyArray, LazyArrayHandler, as_lazy
from omni2_jax.config import PARTS, Omni2Config
from omni2_jax.files import first_line
from omni2_jax.models.model import abstract_state, part_dtype

# Chunks of arrays are stored as "PARAMETER/c/0/3", in Zarr 2 as "PARAMETER/0.3".
CHUNK_ERROR = re.compile(
    r'Error reading "([^"]+?)/(?:c|\d)[^"]*" in OCDBT database at (?:local file "[^"]*"|\S+): (.*)'
)
ALL_PARTS = (*PARTS, "speech_tokenizer")
MAX_NAMED = 10  # parameters that one message names


def flatten(tree: Mapping) -> dict[str, Any]:
    """A nested parameter dict as {"a.b.0.c": leaf}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def unflatten(like: Mapping, leaves: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`: a nested dict like `like`, with `leaves` by path.

    Other paths in `leaves` are ignored. Raises KeyError for a missing one.
    """
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in flatten(like)])


def ignore(_: LazyArray) -> None:
    """The default of `save_part`'s `written`."""


def save_part(
    directory: Path,
    part: str,
    params: Mapping,
    written: Callable[[LazyArray], None] = ignore,
) -> None:
    """Write one part's parameters, with checksums.

    params: nested dict of `LazyArray` leaves, numpy or JAX arrays; JAX arrays that are sharded over
    several processes are written by all of them. written: called after each array that this process
    has written alone.
    """
    leaves = {path: as_lazy(leaf) for path, leaf in flatten(params).items()}
    handler = checksums.tree_handler((LazyArray, LazyArrayHandler(written)))
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            part_directory(directory, part),
            args=ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=FILE_BYTES),
        )
    # Orbax writes the directory's absolute path into this file, and reads only whether it exists.
    marker = part_directory(directory, part) / "commit_success.txt"
    if jax.process_index() == 0 and marker.exists():
        marker.write_text("Checkpoint commit was successful.")


def part_directory(directory: Path, part: str) -> epath.Path:
    """The absolute path of a part's files, as Orbax wants it."""
    return epath.Path(remote.absolute(directory)) / "params" / part


def parts(directory: Path) -> list[str]:
    """The parts that a checkpoint holds, in the order of the data's path.

    The speech tokenizer, "speech_tokenizer", is last.
    """
    return [part for part in ALL_PARTS if (directory / "params" / part / "_METADATA").exists()]


def metadata(directory: Path, part: str) -> dict[str, ocp.metadata.ArrayMetadata]:
    """Shapes and dtypes of a part's parameters by path.

    Raises ValueError naming the part if its files are damaged or missing.
    """
    path = part_directory(directory, part)
    handler = checksums.tree_handler()
    try:
        return dict(handler.metadata(path).tree)
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(damage(path, error)) from None
    finally:
        handler.close()


def load_part(
    directory: Path,
    part: str,
    shapes: Mapping,
    dtype: jnp.dtype | None = None,
    sharding: jax.sharding.Sharding | Mapping | None = None,
) -> dict:
    """Restore one part as a nested dict of arrays; each device reads its own shard of each.

    shapes: nested dict of ShapeDtypeStruct. dtype: of the floating parameters, None = as stored.
    sharding: one for all leaves, or a tree like `shapes`; default the first device. Raises
    ValueError naming the part if its files are damaged or it does not have these shapes.
    """
    expected, treedef = flatten(shapes), jax.tree.structure(shapes)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = (
        dict.fromkeys(expected, sharding)
        if isinstance(sharding, jax.sharding.Sharding)
        else flatten(sharding)
    )
    args = {
        path: ocp.ArrayRestoreArgs(
            dtype=dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None,
            sharding=shardings[path],
        )
        for path, leaf in expected.items()
    }
    check(directory, part, expected)
    leaves = restore(part_directory(directory, part), ocp.args.PyTreeRestore(restore_args=args))
    return jax.tree.unflatten(treedef, [leaves[path] for path in expected])


def stored(directory: Path, part: str) -> dict[str, LazyArray]:
    """A part's parameters by path, as stored. Each can be read without the rest.

    Raises ValueError naming the part if its files are damaged; so does reading a parameter.
    """
    path = part_directory(directory, part)
    context = tensorstore.Context()  # shared, so that the B+tree is read once

    def read(spec: dict) -> np.ndarray:
        try:
            return tensorstore.open(spec, context=context).result().read().result()
        except ValueError as error:
            raise ValueError(damage(path, error)) from None

    return {
        name: LazyArray(
            tuple(array.shape), np.dtype(array.dtype), partial(read, array_spec(path, name, array))
        )
        for name, array in metadata(directory, part).items()
    }


def fingerprint(directory: Path, part: str, max_bytes: float = math.inf) -> str:
    """A hash of a part's parameters, 16 hexadecimal digits.

    max_bytes: the values of a larger array are not read; its path, dtype and shape are hashed.
    Raises ValueError naming the part if its files are damaged.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(stored(directory, part).items()):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        if leaf.nbytes <= max_bytes:
            digest.update(np.ascontiguousarray(leaf.read()).data)
    return digest.hexdigest()[:16]


def array_spec(path: epath.Path, name: str, array: ocp.metadata.ArrayMetadata) -> dict:
    """Where tensorstore finds one array of the part at `path`. Orbax would read the part's metadata
    again for each array, which takes 20 requests to Cloud Storage."""
    if remote.is_remote(path):
        bucket, _, prefix = str(path).removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    else:
        base = {"driver": "file", "path": f"{path}/"}
    return {
        "driver": "zarr3" if checksums.has_checksums(array) else "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "fill_missing_data_reads": False,  # a missing chunk is an error
        "open": True,
    }


def restore(path: epath.Path, args: ocp.args.PyTreeRestore) -> dict:
    """The arrays of the part at `path` that `args` ask for.

    Raises ValueError naming the part, and the parameter where one is damaged.
    """
    handler = checksums.tree_handler()
    try:
        return handler.restore(path, args=args)
    except Exception as error:  # among them a bare Exception around tensorstore's own error
        raise ValueError(damage(path, error.__cause__ or error)) from None
    finally:
        handler.close()


def damage(path: epath.Path, error: BaseException) -> str:
    """The line that tells the user what Orbax or tensorstore could not read."""
    reason = first_line(error).partition(" [tensorstore_spec=")[0]
    chunk = CHUNK_ERROR.search(reason)
    if isinstance(error, KeyError):
        reason = f"its _METADATA lacks {error}"
    if chunk:
        return f"{path} is damaged: its parameter {chunk[1]} cannot be read: {chunk[2]}"
    return f"{path} cannot be read, its files are damaged or missing: {reason}"


def check(directory: Path, part: str, expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless the stored parameters are those of the configuration.

    expected: by path, something that has a shape.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in metadata(directory, part).items()}
    faults = [f"{path} is missing" for path in expected if path not in shapes]
    faults += [f"{path} is not part of the model" for path in shapes if path not in expected]
    faults += [
        f"{path} has shape {list(shapes[path])}, expected {list(leaf.shape)}"
        for path, leaf in expected.items()
        if path in shapes and shapes[path] != tuple(leaf.shape)
    ]
    if faults:
        raise ValueError(
            f"{part_directory(directory, part)} does not fit the checkpoint's configuration: "
            f"{'; '.join(faults[:MAX_NAMED])}"
        )


def check_parts(directory: Path, expected: Collection[str]) -> None:
    """Raise ValueError unless the checkpoint holds all `expected` parts."""
    present = parts(directory)
    absent = [part for part in expected if part not in present]
    if absent:
        raise ValueError(
            f"{directory} lacks the parameters of {', '.join(absent)}, which its config.json "
            "describes"
        )


def load(
    directory: Path, config: Omni2Config, dtype: jnp.dtype, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict]:
    """Graph and parameters of the parts that `config` has.

    The language side is in `dtype`, the decoder in float32 (`model.part_dtype`). mesh: the devices
    that hold them, each parameter cut as its logical axes say; default this process's first device.
    Raises ValueError if the checkpoint lacks a part, is damaged or does not fit `config`.
    """
    graph, state = abstract_state(config)
    shapes = nnx.to_pure_dict(state)
    check_parts(directory, shapes)
    dtypes = {part: part_dtype(part, dtype) for part in shapes}
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    shardings = sharding.of_params(state, mesh)
    return graph, {
        part: load_part(directory, part, shapes[part], dtypes[part], shardings[part])
        for part in shapes
    }

"""A checkpoint directory: the configuration, tokenizers, voices, and one Orbax (tensorstore) tree per part, each restorable alone.

CKPT/config.json  generation_config.json  tokenizer/  tts_tokenizer/  voices/NAME.npy  assets/  params/PART/

A speech tokenizer, which makes training data, may lie in it as one more part, `units`, with a units.json (see units.py).
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.config import DECODER_PARTS, PARTS, Omni2Config
from omni2_jax.model import Model

CHUNK_BYTES = 8 * 2**20  # tensorstore's unit of reading and writing
FILE_BYTES = 4 * CHUNK_BYTES  # tensorstore holds compressed chunks in memory until they fill a file


@dataclass(frozen=True)
class Unread:
    """A parameter that is read only while it is being written: its shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class UnreadHandler(ocp.type_handlers.NumpyHandler):
    """Saves `Unread` leaves one after the other, so that one large parameter, or a few small ones, are in memory at a time."""

    def __init__(self, written: Callable[[Unread], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.written = written
        self.failures: list[Exception] = []

    async def serialize(self, values, infos, args=None):
        for some in batches(values):
            await super()._background_serialize([value.read() for value in values[some]], infos[some], args[some])
            if self.failures:
                raise self.failures[0]
            for value in values[some]:
                self.written(value)
        return []  # nothing is left to a background thread, so what goes wrong is raised here

    async def _open_and_write(self, value, tspec, ts_context):
        # Orbax cuts axes into divisors only, and the 158227 tokens of the speech LM, a prime, into single rows.
        tspec["metadata"]["chunks"] = chunk_shape(value.shape, value.dtype.itemsize)
        try:
            await super()._open_and_write(value, tspec, ts_context)
        except Exception as error:  # of many kinds; the writes beside this one have to end before it is raised
            self.failures.append(error)


def chunk_shape(shape: Sequence[int], itemsize: int) -> list[int]:
    """Contiguous pieces of an array, of CHUNK_BYTES at most: the first axes are cut, the last ones whole."""
    chunk = []
    for axis, size in enumerate(shape):
        most = max(1, min(size, CHUNK_BYTES // max(1, itemsize * math.prod(shape[axis + 1 :]))))
        # Pieces that go into the axis evenly are compressed without a copy.
        chunk.append(next((even for even in range(most, most // 2, -1) if size % even == 0), most))
    return chunk


def batches(leaves: Sequence[Unread]) -> Iterator[slice]:
    """Slices of CHUNK_BYTES together at most, or of one larger leaf. Each is a commit, and a commit of tiny leaves is mostly overhead."""
    start, size = 0, 0
    for i, leaf in enumerate(leaves):
        if i > start and size + leaf.nbytes > CHUNK_BYTES:
            yield slice(start, i)
            start, size = i, 0
        size += leaf.nbytes
    yield slice(start, len(leaves))


def flatten(tree: Mapping) -> dict[str, object]:
    """A nested parameter dict as {"a.b.0.c": leaf}."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SameKey:
    """Stands in for nnx.Rngs where only shapes are wanted; counting keys makes abstract tracing of many layers slow (3 s of 4)."""

    key: jax.Array

    def params(self) -> jax.Array:
        return self.key

    def split(self, count: int) -> "SameKey":
        return SameKey(jax.random.split(self.key, count))


def abstract_state(config: Omni2Config) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and its parameters as shapes with their logical axes, nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: Model(config, SameKey(jax.random.key(0)))))


def abstract(config: Omni2Config) -> tuple[nnx.GraphDef, dict]:
    """The same without the axes: ({part: tree of ShapeDtypeStruct})."""
    graph, state = abstract_state(config)
    return graph, nnx.to_pure_dict(state)


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` only when the block ends well; otherwise nothing is left behind."""
    if out.exists():
        raise ValueError(f"{out} exists already; give a new directory")
    work = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    try:
        yield work
        work.rename(out)
    finally:
        remove(work)


def remove(directory: Path, seconds: float = 10) -> None:
    """Delete a directory, into which tensorstore goes on writing for a moment when it is interrupted."""
    deadline = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def save_part(directory: Path, part: str, params: Mapping, written: Callable[[Unread], None] = lambda _: None) -> None:
    """Write one part's parameters: a nested dict of `Unread` leaves, numpy or JAX arrays."""
    leaves = {path: unread(leaf) for path, leaf in flatten(params).items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (Unread, UnreadHandler(written)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory.absolute() / "params" / part, args=ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=FILE_BYTES))


def unread(leaf: Unread | np.ndarray | jax.Array) -> Unread | jax.Array:
    """An array that this process holds whole as one to be copied to the host when its turn comes; others Orbax writes in shards."""
    if isinstance(leaf, Unread) or not getattr(leaf, "is_fully_addressable", True):
        return leaf
    return Unread(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def parts(directory: Path) -> list[str]:
    """The parts that a checkpoint holds, in the order of the data's path, and last the speech tokenizer, "units"."""
    return [part for part in (*PARTS, "units") if (directory / "params" / part / "_METADATA").exists()]


def metadata(directory: Path, part: str) -> dict[str, ocp.metadata.ArrayMetadata]:
    """Shapes and dtypes of a part's parameters by path. Raises ValueError when its files are damaged."""
    where = (directory / "params" / part).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            found = checkpointer.metadata(where).item_metadata
            if found is None:
                raise ValueError("the list of its parameters cannot be read")
            return found.tree
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} cannot be read, its files are damaged or missing: {first_line(error)}") from None


def load_part(directory: Path, part: str, shapes: Mapping, dtype: jnp.dtype | None = None, sharding=None) -> dict:
    """Restore one part as a nested dict of arrays, every device its own piece of each.

    shapes: nested dict of ShapeDtypeStruct. dtype: of the floating parameters, None = as stored. sharding: one for all
    leaves, or a tree like `shapes`; default the first device. Raises ValueError naming the part and what is wrong with it.
    """
    where = directory / "params" / part
    expected, treedef = flatten(shapes), jax.tree.structure(shapes)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = dict.fromkeys(expected, sharding) if isinstance(sharding, jax.sharding.Sharding) else flatten(sharding)
    args = {path: ocp.ArrayRestoreArgs(dtype=dtype, sharding=shardings[path]) for path in expected}
    check(where, {path: tuple(leaf.shape) for path, leaf in metadata(directory, part).items()}, expected)
    leaves = restore(where, ocp.args.PyTreeRestore(restore_args=args))
    return jax.tree.unflatten(treedef, [leaves[path] for path in expected])


def stored(directory: Path, part: str) -> dict[str, Unread]:
    """A part's parameters by path, as stored, each to be read without the rest."""
    where = (directory / "params" / part).absolute()

    def reader(path: str) -> Callable[[], np.ndarray]:
        args = ocp.args.PyTreeRestore({path: 0}, restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True)
        return lambda: restore(where, args)[path]

    return {path: Unread(tuple(leaf.shape), np.dtype(leaf.dtype), reader(path)) for path, leaf in metadata(directory, part).items()}


def restore(where: Path, args: ocp.args.PyTreeRestore) -> dict:
    """What Orbax restores. Raises ValueError naming the part and, on one line, what keeps it from being restored."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(where.absolute(), args=args)
        except Exception as error:  # damaged files raise many kinds, a bare Exception around tensorstore's own error among them
            raise ValueError(f"{where} cannot be restored, are its files damaged? {first_line(error.__cause__ or error)}") from None


def check(where: Path, stored: Mapping[str, tuple], expected: Mapping) -> None:
    """Raise ValueError unless the stored parameters are those of the configuration."""
    faults = [f"{path} is missing" for path in expected if path not in stored]
    faults += [f"{path} is not part of the model" for path in stored if path not in expected]
    faults += [
        f"{path} has shape {list(stored[path])}, expected {list(leaf.shape)}"
        for path, leaf in expected.items()
        if path in stored and stored[path] != tuple(leaf.shape)
    ]
    if faults:
        raise ValueError(f"{where} does not fit the checkpoint's configuration: {'; '.join(faults[:10])}")


def load(directory: Path, config: Omni2Config, dtype: jnp.dtype, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, dict]:
    """Graph and parameters of the parts that `config` has: the language side in `dtype`, the decoder in float32 (its solver needs it).

    mesh: where they go, each cut as its logical axes say; default this process's first device.
    """
    graph, state = abstract_state(config)
    shapes = nnx.to_pure_dict(state)
    absent = [part for part in shapes if part not in parts(directory)]
    if absent:
        raise ValueError(f"{directory} lacks the parameters of {', '.join(absent)}, which its config.json describes")
    dtypes = {part: jnp.float32 if part in DECODER_PARTS else dtype for part in shapes}
    places = sharding.of_params(state, mesh or sharding.make_mesh(devices=jax.local_devices()[:1]))
    return graph, {part: load_part(directory, part, shapes[part], dtypes[part], places[part]) for part in shapes}


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""A checkpoint directory: the configuration, tokenizers, voices, and one Orbax (tensorstore) tree per part, each restorable alone.

CKPT/config.json  generation_config.json  tokenizer/  tts_tokenizer/  voices/NAME.npy  assets/  params/PART/
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from omni2_jax.config import DECODER_PARTS, PARTS, Omni2Config
from omni2_jax.model import Model

CHUNK_BYTES = 64 * 2**20  # tensorstore's unit of reading and writing: it bounds host memory


@dataclass(frozen=True)
class Unread:
    """A parameter that is read only while it is being written: its shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class UnreadHandler(ocp.type_handlers.NumpyHandler):
    """Saves `Unread` leaves one after the other, so that one parameter at a time is in memory."""

    def __init__(self, written: Callable[[Unread], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.written = written

    async def serialize(self, values, infos, args=None):
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._background_serialize(values, infos, args), name="unread")]

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value.read()], [info], [arg])
            self.written(value)


def flatten(tree: Mapping) -> dict[str, object]:
    """A nested parameter dict as {"a.b.0.c": leaf}."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def abstract(config: Omni2Config) -> tuple[nnx.GraphDef, dict]:
    """The model's graph and its parameters as shapes, nothing allocated: ({part: tree of ShapeDtypeStruct})."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(config, nnx.Rngs(0))))
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
        shutil.rmtree(work, ignore_errors=True)


def save_part(directory: Path, part: str, params: Mapping, written: Callable[[Unread], None] = lambda _: None) -> None:
    """Write one part's parameters: a nested dict of `Unread` leaves, numpy or JAX arrays."""
    leaves = flatten(params)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Unread, UnreadHandler(written)), (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    chunked = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in leaves}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory.absolute() / "params" / part, args=ocp.args.PyTreeSave(leaves, save_args=chunked))


def parts(directory: Path) -> list[str]:
    """The parts that a checkpoint holds, in the order of the data's path."""
    return [part for part in PARTS if (directory / "params" / part / "_METADATA").exists()]


def metadata(directory: Path, part: str) -> dict[str, ocp.metadata.ArrayMetadata]:
    """Shapes and dtypes of a part's parameters by path. Raises ValueError when its files are damaged."""
    where = (directory / "params" / part).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.metadata(where).item_metadata.tree
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where} cannot be read, its files are damaged or missing: {first_line(error)}") from None


def load_part(directory: Path, part: str, shapes: Mapping, dtype: jnp.dtype | None = None, sharding=None) -> dict:
    """Restore one part as a nested dict of arrays.

    shapes: nested dict of ShapeDtypeStruct. dtype: of the floating parameters, None = as stored. sharding: one for all
    leaves, or a tree like `shapes`; default the first device. Raises ValueError naming the part and what is wrong with it.
    """
    where = directory / "params" / part
    expected, treedef = flatten(shapes), jax.tree.structure(shapes)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(expected, sharding) if isinstance(sharding, jax.sharding.Sharding) else flatten(sharding)
    args = {path: ocp.ArrayRestoreArgs(dtype=dtype, sharding=shardings[path]) for path in expected}
    check(where, {path: tuple(leaf.shape) for path, leaf in metadata(directory, part).items()}, expected)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            leaves = checkpointer.restore(where.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} cannot be restored, its files are damaged or missing: {first_line(error)}") from None
    return jax.tree.unflatten(treedef, [leaves[path] for path in expected])


def load_leaf(directory: Path, part: str, path: str) -> np.ndarray:
    """One parameter as stored, without reading the rest of its part."""
    where = (directory / "params" / part).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        wanted = {path: ocp.RestoreArgs(restore_type=np.ndarray)}
        restored = checkpointer.restore(where, args=ocp.args.PyTreeRestore({path: 0}, restore_args=wanted, partial_restore=True))
    return restored[path]


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
        raise ValueError(f"{where} does not fit its config.json: {'; '.join(faults[:10])}")


def load(directory: Path, config: Omni2Config, dtype: jnp.dtype) -> tuple[nnx.GraphDef, dict]:
    """The graph and parameters of the parts that `config` has: the language side in `dtype`, the decoder in float32 (its solver needs it)."""
    graph, shapes = abstract(config)
    absent = [part for part in shapes if part not in parts(directory)]
    if absent:
        raise ValueError(f"{directory} lacks the parameters of {', '.join(absent)}, which its config.json describes")
    dtypes = {part: jnp.float32 if part in DECODER_PARTS else dtype for part in shapes}
    return graph, {part: load_part(directory, part, shapes[part], dtypes[part]) for part in shapes}


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""A checkpoint directory: the configuration, tokenizers, voices, and one Orbax (tensorstore) tree per part, each restorable alone.

CKPT/config.json  generation_config.json  tokenizer/  tts_tokenizer/  voices/NAME.npy  assets/  params/PART/

A speech tokenizer, which makes training data, may lie in it as one more part, `speech_tokenizer`, with a speech_tokenizer.json (see models/speech_tokenizer.py).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.checkpoint.lazy import FILE_BYTES, LazyArray, LazyArrayHandler, as_lazy
from omni2_jax.config import DECODER_PARTS, PARTS, Omni2Config
from omni2_jax.files import first_line
from omni2_jax.models.model import abstract_state


def flatten(tree: Mapping) -> dict[str, object]:
    """A nested parameter dict as {"a.b.0.c": leaf}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def save_part(
    directory: Path,
    part: str,
    params: Mapping,
    written: Callable[[LazyArray], None] = lambda _: None,
) -> None:
    """Write one part's parameters: a nested dict of `LazyArray` leaves, numpy or JAX arrays."""
    leaves = {path: as_lazy(leaf) for path, leaf in flatten(params).items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, LazyArrayHandler(written)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    ) as checkpointer:
        checkpointer.save(
            directory.absolute() / "params" / part,
            args=ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=FILE_BYTES),
        )


def parts(directory: Path) -> list[str]:
    """The parts that a checkpoint holds, in the order of the data's path, and last the speech tokenizer, "speech_tokenizer"."""
    return [
        part
        for part in (*PARTS, "speech_tokenizer")
        if (directory / "params" / part / "_METADATA").exists()
    ]


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
            raise ValueError(
                f"{where} cannot be read, its files are damaged or missing: {first_line(error)}"
            ) from None


def load_part(
    directory: Path, part: str, shapes: Mapping, dtype: jnp.dtype | None = None, sharding=None
) -> dict:
    """Restore one part as a nested dict of arrays, every device its own piece of each.

    shapes: nested dict of ShapeDtypeStruct. dtype: of the floating parameters, None = as stored. sharding: one for all
    leaves, or a tree like `shapes`; default the first device. Raises ValueError naming the part and what is wrong with it.
    """
    where = directory / "params" / part
    expected, treedef = flatten(shapes), jax.tree.structure(shapes)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = (
        dict.fromkeys(expected, sharding)
        if isinstance(sharding, jax.sharding.Sharding)
        else flatten(sharding)
    )
    args = {path: ocp.ArrayRestoreArgs(dtype=dtype, sharding=shardings[path]) for path in expected}
    check(
        where,
        {path: tuple(leaf.shape) for path, leaf in metadata(directory, part).items()},
        expected,
    )
    leaves = restore(where, ocp.args.PyTreeRestore(restore_args=args))
    return jax.tree.unflatten(treedef, [leaves[path] for path in expected])


def stored(directory: Path, part: str) -> dict[str, LazyArray]:
    """A part's parameters by path, as stored, each to be read without the rest."""
    where = (directory / "params" / part).absolute()

    def reader(path: str) -> Callable[[], np.ndarray]:
        args = ocp.args.PyTreeRestore(
            {path: 0},
            restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        return lambda: restore(where, args)[path]

    return {
        path: LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), reader(path))
        for path, leaf in metadata(directory, part).items()
    }


def restore(where: Path, args: ocp.args.PyTreeRestore) -> dict:
    """What Orbax restores. Raises ValueError naming the part and, on one line, what keeps it from being restored."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(where.absolute(), args=args)
        except Exception as error:  # damaged files raise many kinds, a bare Exception around tensorstore's own error among them
            raise ValueError(
                f"{where} cannot be restored, are its files damaged? {first_line(error.__cause__ or error)}"
            ) from None


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
        raise ValueError(
            f"{where} does not fit the checkpoint's configuration: {'; '.join(faults[:10])}"
        )


def load(
    directory: Path, config: Omni2Config, dtype: jnp.dtype, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, dict]:
    """Graph and parameters of the parts that `config` has: the language side in `dtype`, the decoder in float32 (its solver needs it).

    mesh: where they go, each cut as its logical axes say; default this process's first device.
    """
    graph, state = abstract_state(config)
    shapes = nnx.to_pure_dict(state)
    absent = [part for part in shapes if part not in parts(directory)]
    if absent:
        raise ValueError(
            f"{directory} lacks the parameters of {', '.join(absent)}, which its config.json describes"
        )
    dtypes = {part: jnp.float32 if part in DECODER_PARTS else dtype for part in shapes}
    places = sharding.of_params(state, mesh or sharding.make_mesh(devices=jax.local_devices()[:1]))
    return graph, {
        part: load_part(directory, part, shapes[part], dtypes[part], places[part])
        for part in shapes
    }

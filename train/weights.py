"""The weights of a run: loaded for a stage, split into trained and frozen ones, and exported as a
complete checkpoint.

Parameters are flat dictionaries here, {"llm.layers.mlp.up.kernel": array}, so that what is trained
is a choice of paths.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from omni2_jax import remote, sharding
from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import Omni2Config
from omni2_jax.models.layers import LORA_SCALE
from omni2_jax.models.model import Model, abstract_state, part_dtype

if TYPE_CHECKING:
    from omni2_jax.train.stages.base import Stage

Params = dict[str, jax.Array]
Build = Callable[[Omni2Config, nnx.Rngs], nnx.Module]


@dataclass(frozen=True)
class Weights:
    """Shapes and shardings of a model's parameters by path, without their values."""

    config: Omni2Config
    build: Build
    graph: nnx.GraphDef
    nested_shapes: dict
    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]

    @classmethod
    def of(cls, config: Omni2Config, mesh: Mesh, build: Build = Model) -> "Weights":
        """Of the model `build(config, rngs)`; nothing is allocated."""
        graph, state = abstract_state(config, build)
        nested = nnx.to_pure_dict(state)
        shardings = parameters.flatten(sharding.of_params(state, mesh))
        return cls(config, build, graph, nested, parameters.flatten(nested), shardings)

    def nested(self, leaves: Mapping[str, Any]) -> dict:
        """Values as the model's nested dictionary; a parameter without a value stays a shape."""
        return parameters.unflatten(self.nested_shapes, self.shapes | dict(leaves))

    def model(self, *params: Mapping[str, jax.Array]) -> Any:
        """The model with these parameters, which may come in several dictionaries."""
        leaves = {path: leaf for group in params for path, leaf in group.items()}
        return nnx.merge(self.graph, self.nested(leaves))


def stage_weights(stage: "Stage", config: Omni2Config, mesh: Mesh) -> Weights:
    """The parameters of a stage's model while it is trained. config: of the checkpoint."""
    return Weights.of(stage.train_config(config), mesh, stage.build)


def split_params(stage: "Stage", values: Mapping[str, Any]) -> tuple[dict, dict]:
    """Values by path -> (those that the stage trains, those that it does not)."""
    trained = {path: leaf for path, leaf in values.items() if stage.is_trained(path)}
    return trained, {path: leaf for path, leaf in values.items() if path not in trained}


def configure(stage: "Stage", directory: Path) -> Omni2Config:
    """The configuration of the exported checkpoint, from that of the one to start from.

    Raises ValueError naming the parts that the checkpoint lacks, or that `reset` names though the
    stage does not train them.
    """
    config, train = Omni2Config.load(directory / "config.json"), stage.train
    stored = parameters.parts(directory)
    missing = [
        part for part in stage.parts if part not in stored and part not in stage.drawn(config)
    ]
    missing = missing or [part for part in stage.parts if getattr(config, part, True) is None]
    if missing:
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}, which stage {train.stage} needs; "
            "omni2 convert adds parts to a checkpoint"
        )
    forms = {part: getattr(getattr(config, part, None), "weights", "float") for part in stage.parts}
    if quantized := [part for part, form in forms.items() if form != "float"]:
        raise ValueError(
            f"{directory}: {', '.join(quantized)} has int8 weights, which are not trained; "
            f"train the checkpoint that was quantized, or `omni2 join {directory} --dequantize`"
        )
    if wrong := [part for part in train.reset if part not in stage.trained]:
        raise ValueError(
            f"reset {', '.join(wrong)}: stage {train.stage} trains {', '.join(stage.trained)} only"
        )
    return stage.configure(config)


def load(stage: "Stage", directory: Path, mesh: Mesh) -> tuple[Weights, Params, Params]:
    """(shapes, trained parameters in float32, frozen ones in the dtype of the computation).

    Each device holds its share of every array from the moment it is read. Raises ValueError if the
    checkpoint lacks a part or does not fit its configuration.
    """
    drawn = stage.drawn(Omni2Config.load(directory / "config.json"))
    config = configure(stage, directory)
    stored = Weights.of(stage.model_config(config), mesh, stage.build)
    values: Params = {}
    for part in stage.loaded:
        if part not in drawn:
            values |= load_part(stage, stored, directory, part)
    weights = stage_weights(stage, config, mesh)
    parts = (*stage.loaded, *stage.private)
    missing = [
        path for path in weights.shapes if path not in values and path.partition(".")[0] in parts
    ]
    values |= initial(weights, missing, stage.train.seed)
    trained, frozen = split_params(stage, values)
    for path in trained:
        if (start := stage.initial(path)) is not None:
            value = start.read()
            trained[path] = jax.make_array_from_callback(
                value.shape, weights.shardings[path], value.__getitem__
            )
    return weights, {path: leaf.astype(jnp.float32) for path, leaf in trained.items()}, frozen


def load_part(stage: "Stage", stored: Weights, directory: Path, part: str) -> Params:
    """One part of a checkpoint by path; float32 if it is trained or belongs to the decoder.

    The LLM under low-rank updates is not trained itself.
    """
    is_trained = any(
        stage.is_trained(path) for path in stored.shapes if path.startswith(f"{part}.")
    )
    dtype = jnp.float32 if is_trained else part_dtype(part, jnp.dtype(stage.train.dtype))
    shapes, shardings = stored.nested(stored.shapes), stored.nested(stored.shardings)
    loaded = parameters.load_part(directory, part, shapes[part], dtype, shardings[part])
    return with_prefix(parameters.flatten(loaded), part)


def initial(weights: Weights, paths: Collection[str], seed: int) -> Params:
    """Random values of some parameters, as their modules draw them."""
    if not paths:
        return {}

    def draw() -> dict:
        model = weights.build(weights.config, nnx.Rngs(seed))
        leaves = parameters.flatten(nnx.to_pure_dict(nnx.split(model)[1]))
        return {path: leaves[path] for path in paths}

    return jax.jit(draw, out_shardings={path: weights.shardings[path] for path in paths})()


def merged(trained: Params, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters, with low-rank updates added to their kernels, in the kernels' dtype.

    Frozen parameters may be of type `LazyArray`; the result then has them as `LazyArray`, too, and
    every process of a run has to call this function.
    """
    values = {**frozen, **trained}
    for path in [path for path in values if path.endswith(".low")]:
        stem = path.removesuffix("low")
        low, high, kernel = values.pop(path), values.pop(f"{stem}high"), values[f"{stem}kernel"]
        if isinstance(kernel, LazyArray):
            values[f"{stem}kernel"] = updated_when_read(kernel, low, high)
        else:  # layers are stacked on the first axis
            values[f"{stem}kernel"] = jax.vmap(updated)(kernel, low, high)
    return values


def updated(kernel: Any, low: Any, high: Any) -> Any:
    """The kernel of one layer with its low-rank update, computed in float32."""
    update = low.reshape(-1, low.shape[-1]) @ high.reshape(high.shape[0], -1)
    update = LORA_SCALE * update.reshape(kernel.shape)
    return (kernel.astype(np.float32) + update).astype(kernel.dtype)


def updated_when_read(kernel: LazyArray, low: jax.Array, high: jax.Array) -> LazyArray:
    """Stored kernels [layers, ...] with their updates, computed one layer at a time."""
    updates = [multihost_utils.process_allgather(array, tiled=True) for array in (low, high)]

    def read() -> np.ndarray:
        values = np.require(kernel.read(), requirements="W")  # no second copy
        for number, layer in enumerate(zip(values, *updates, strict=True)):
            values[number] = updated(*layer)
        return values

    return LazyArray(kernel.shape, kernel.dtype, read)


def export(stage: "Stage", start: Path, trained: Params, frozen: Params, out: Path) -> None:
    """Write the checkpoint `start` with its trained parts replaced, in the dtypes of `start`.

    Every process of a run calls it. `out` appears whole or not at all. Parts that did not change
    are hard links where the file system allows it.
    """
    # Cloud Storage has no rename: there `out` becomes a checkpoint with its config.json.
    renames = not remote.is_remote(out)
    work = out.with_name(out.name + ".partial") if renames else out
    if jax.process_index() == 0:
        remote.remove(work)
        copy_checkpoint(start, work, without=stage.trained)
    sync("exporting")
    drawn = stage.drawn(Omni2Config.load(start / "config.json"))
    for part in stage.trained:
        stored = parameters.stored(start, part) if part in parameters.parts(start) else {}
        stays: dict[str, Any] = without_prefix(frozen, part)
        if part not in drawn:
            # As it is stored: in memory it was rounded to the dtype of the computation.
            stays |= {path: stored[path] for path in stays}
        leaves = merged(without_prefix(trained, part), stays)
        for path, leaf in leaves.items():
            if path in stored and not isinstance(leaf, LazyArray):
                leaves[path] = leaf.astype(stored[path].dtype)
        parameters.save_part(work, part, leaves)
    sync("exported")
    if jax.process_index() == 0:
        configure(stage, start).save(work / "config.json")
        if renames:
            remote.remove(out)
            work.rename(out)
    sync("renamed")


def copy_checkpoint(start: Path, out: Path, without: Collection[str]) -> None:
    """Link or copy a checkpoint, except its config.json and the parameters of some parts."""
    if remote.is_remote(start) or remote.is_remote(out):
        skipped = [start / "config.json", *(start / "params" / part for part in without)]
        paths = [path for path in remote.files(start) if not {path, *path.parents} & {*skipped}]
        remote.copy_files(start, out, paths)
        return
    excluded = [f"{start}/config.json", *(f"{start}/params/{part}" for part in without)]

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if f"{folder}/{name}" in excluded]

    shutil.copytree(start, out, ignore=ignore, copy_function=link)


def link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def with_prefix(leaves: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The parameters of a part by their path in the model."""
    return {f"{part}.{path}": leaf for path, leaf in leaves.items()}


def without_prefix(leaves: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The parameters of one part, by their path within it."""
    prefix = f"{part}."
    return {
        path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)
    }


def sync(name: str) -> None:
    """Wait until all processes of the run are at the same point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

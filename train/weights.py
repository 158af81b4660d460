"""The weights of a run: loaded for a stage, told apart into trained and frozen ones, and written as a checkpoint that can talk.

Both are flat dictionaries, {"llm.layers.mlp.up.kernel": array}: what is trained is a choice of paths.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from omni2_jax import sharding
from omni2_jax.checkpoint import parameters
from omni2_jax.config import DECODER_PARTS, Omni2Config
from omni2_jax.models.layers import LORA_SCALE
from omni2_jax.models.model import ConstantKey, Model
from omni2_jax.train import stages
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import STAGES, is_trained

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Weights:
    """The parameters of a stage's parts, not their values."""

    config: Omni2Config  # no other parts than the stage's
    graph: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]

    @classmethod
    def of(cls, config: Omni2Config, mesh: Mesh) -> "Weights":
        graph, state = nnx.split(
            nnx.eval_shape(lambda: Model(config, ConstantKey(jax.random.key(0))))
        )
        shapes = nnx.to_pure_dict(state)
        shardings = parameters.flatten(sharding.of_params(state, mesh))
        return cls(config, graph, jax.tree.structure(shapes), parameters.flatten(shapes), shardings)

    def nested(self, params: Mapping[str, object]) -> dict:
        """As modules hold them; what is not given stays a shape."""
        return jax.tree.unflatten(
            self.treedef, [params.get(path, shape) for path, shape in self.shapes.items()]
        )

    def model(self, *params: Mapping[str, jax.Array]) -> Model:
        """A module over all parameters, which may come in several dictionaries."""
        return nnx.merge(
            self.graph, self.nested({path: leaf for some in params for path, leaf in some.items()})
        )


def configure(train: TrainConfig, directory: Path) -> Omni2Config:
    """The checkpoint's configuration as this stage has it. Raises ValueError naming the parts that are missing."""
    config = Omni2Config.load(directory / "config.json")
    parts = STAGES[train.stage].parts
    missing = [
        part
        for part in parts
        if part not in parameters.parts(directory) and part not in train.reset
    ]
    missing = missing or [
        part for part in parts if part != "fusion" and getattr(config, part) is None
    ]
    if missing:
        added = "python -m convert adds parts to a checkpoint"
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}, which stage {train.stage} needs; {added}"
        )
    if strange := [part for part in train.reset if part not in STAGES[train.stage].trained]:
        raise ValueError(
            f"reset {', '.join(strange)}: stage {train.stage} trains {', '.join(STAGES[train.stage].trained)} only"
        )
    if train.stage == "2":
        config = config.replace(mix=train.mix)
    return config


def load(train: TrainConfig, directory: Path, mesh: Mesh) -> tuple[Weights, Params, Params]:
    """(weights, trained in float32, frozen in the dtype of the computation), each array cut over the mesh as it is read."""
    config = configure(train, directory)
    stage, stored = STAGES[train.stage], Omni2Config.load(directory / "config.json")
    anew = set(train.reset) | ({"fusion"} if config.mix != stored.mix else set())
    plain = Weights.of(config.only(*stage.parts), mesh)
    values: Params = {}
    for part in set(stages.parts(train)) - anew:
        nested = lambda leaves, part=part: plain.nested(leaves)[part]  # noqa: E731
        dtype = (
            jnp.float32
            if (part in stage.trained and not train.rank) or part in DECODER_PARTS
            else jnp.dtype(train.dtype)
        )
        loaded = parameters.load_part(
            directory, part, nested(plain.shapes), dtype, nested(plain.shardings)
        )
        values |= {f"{part}.{path}": leaf for path, leaf in parameters.flatten(loaded).items()}
    weights = plain if not train.rank else Weights.of(with_rank(plain.config, train.rank), mesh)
    values |= initial(
        weights,
        [
            path
            for path in weights.shapes
            if path not in values and path.partition(".")[0] in stages.parts(train)
        ],
        train.seed,
    )
    trained = {
        path: leaf.astype(jnp.float32) for path, leaf in values.items() if is_trained(train, path)
    }
    return weights, trained, {path: leaf for path, leaf in values.items() if path not in trained}


def with_rank(config: Omni2Config, rank: int) -> Omni2Config:
    return config.replace(llm=replace(config.llm, rank=rank))


def initial(weights: Weights, paths: list[str], seed: int) -> Params:
    """New values of some parameters, as their modules draw them."""
    if not paths:
        return {}

    def draw() -> Params:
        model = Model(weights.config, nnx.Rngs(seed))
        leaves = parameters.flatten(nnx.to_pure_dict(nnx.split(model)[1]))
        return {path: leaves[path] for path in paths}

    return jax.jit(draw, out_shardings={path: weights.shardings[path] for path in paths})()


def merged(trained: Params, frozen: Params) -> Params:
    """All parameters, low-rank updates added to their kernels."""
    whole = frozen | trained
    for path in [path for path in whole if path.endswith(".low")]:
        stem = path.removesuffix("low")
        low, high, kernel = whole.pop(path), whole.pop(f"{stem}high"), whole[f"{stem}kernel"]
        update = low.reshape(low.shape[0], -1, low.shape[-1]) @ high.reshape(
            *high.shape[:2], -1
        )  # layers are stacked
        whole[f"{stem}kernel"] = (
            kernel.astype(jnp.float32) + LORA_SCALE * update.reshape(kernel.shape)
        ).astype(kernel.dtype)
    return whole


def export(train: TrainConfig, start: Path, trained: Params, frozen: Params, out: Path) -> None:
    """Write the checkpoint `start` with what was trained in its place, in the dtypes of `start`; `out` appears whole or not at all.

    Every process of a run calls it. Parts that did not change are hard links where the file system allows it.
    """
    changed = STAGES[train.stage].trained
    params = merged(trained, frozen)
    work = out.with_name(out.name + ".partial")
    if jax.process_index() == 0:
        shutil.rmtree(work, ignore_errors=True)
        ignored = [f"{start}/params/{part}" for part in changed]
        skip = lambda folder, names: [name for name in names if f"{folder}/{name}" in ignored]  # noqa: E731
        shutil.copytree(start, work, ignore=skip, copy_function=link)
        # A new file: writing into a link would change the checkpoint it came from.
        (work / "config.json").unlink()
        configure(train, start).save(work / "config.json")
    sync("exporting")
    for part in changed:
        stored = parameters.metadata(start, part) if part in parameters.parts(start) else {}
        leaves = {
            path.removeprefix(f"{part}."): leaf
            for path, leaf in params.items()
            if path.startswith(f"{part}.")
        }
        leaves = {
            path: leaf.astype(stored[path].dtype) if path in stored else leaf
            for path, leaf in leaves.items()
        }
        parameters.save_part(work, part, leaves)
    sync("exported")
    if jax.process_index() == 0:
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    sync("renamed")


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)

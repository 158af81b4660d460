"""`python -m benchmarks.aot`: compile for a slice of TPUs that is not there, and tell what it would hold, compute and communicate.

Nothing is allocated: all inputs are shapes that say how they are cut. The compiler is libtpu's, the programs are those of
train/step.py and of the engine. Sizes are of one device, FLOPs of all of them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # these before jax is imported
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import dataclasses
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import typer
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import roofline, sizes
from benchmarks.hlo import collectives
from benchmarks.sizes import SIZES, dtype_of
from omni2_jax import files, sharding
from omni2_jax.cli.console import run_function
from omni2_jax.config import Omni2Config
from omni2_jax.configs import stage1a, stage2
from omni2_jax.devices import MEMORY_GIB
from omni2_jax.generate.engine import Programs
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write import Request
from omni2_jax.models.model import abstract_state
from omni2_jax.train import flops, overrides, step
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.weights import split_params, stage_weights

GIB = 2**30
WORKING = "v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4, v5e:4x8, v5e:8x8, v5e:16x16, v4:2x2x1, v5p:2x2x1, v5p:4x4x4, v6e:2x4 and tpu7x:2x2x1"
TRAINING = {"train": stage1a.config, "train2": stage2.config}
STREAMING = ("prefill", "step")
STEPS = 1000  # of a schedule of the learning rate; only constants depend on it
console = rich.console.Console()


@dataclass(frozen=True)
class Job:
    """A jitted function and the shapes of its arguments, the same by kind, and the FLOPs of one call."""

    function: jax.stages.Wrapped
    arguments: tuple
    kinds: dict[str, object]
    flops: float
    keywords: dict[str, object] = field(default_factory=dict)


def devices(topology: str) -> Sequence[jax.Device]:
    """Those of a slice, "v5e:4x4". Raises ValueError if there is no such slice, or no compiler for it."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs libtpu, which is not installed: pip install 'omni2-jax[tpu-aot]'"
        )
    alone = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"\w+:1x1(x1)?", topology) else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **alone).devices
    except Exception as error:  # of many kinds, libtpu's own among them
        why = files.first_line(error)
        raise ValueError(
            f"topology {topology!r} does not exist ({why}); names that work are {WORKING}"
        ) from None


def placed(shapes, where):
    """A tree of shapes that say how they are cut."""
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, where)


def share(tree) -> int:
    """Bytes that a device holds of a tree of shapes, before they are laid out in tiles."""
    return sum(
        roofline.size(leaf.update(shape=leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
    )


def training(train: TrainConfig, config: Omni2Config, mesh: Mesh) -> Job:
    """A step of a stage, in the first of its buckets."""
    stage, bucket = stage_of(train), train.buckets[0]
    config = stage.configure(config)
    weights = stage_weights(stage, config, mesh)
    params = {
        path: leaf.update(sharding=weights.shardings[path])
        for path, leaf in sizes.training_shapes(stage, weights).items()
    }
    trained, frozen = split_params(stage, params)
    objective = stage.objective(weights, STEPS)
    shardings = objective.shardings(trained, mesh)
    state = placed(jax.eval_shape(objective.initial, trained), shardings)
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.RULES["batch"]))
    empty = stage.example_type(train, config, None, None).empty(bucket)
    cut = (train.microbatches, train.batch // train.microbatches)
    batch = {
        name: jax.ShapeDtypeStruct((*cut, *value.shape), value.dtype, sharding=rows)
        for name, value in empty.items()
    }
    return Job(
        step.compile_step(objective, shardings),
        (state, frozen, batch),
        {
            "parameters, trained": state.params,
            "parameters, frozen": frozen,
            "optimizer": (state.opt, state.ema),
            "batch": batch,
        },
        flops.step(stage, config, weights.shapes, bucket),
    )


def streaming(name: str, engine_config: EngineConfig, config: Omni2Config, mesh: Mesh) -> Job:
    """A call of the engine's: a step of all slots, or a piece of a turn's prompt."""
    config = config.replace(speaker=None)
    graph, state = abstract_state(config)
    dtype = lambda path, leaf: leaf.update(dtype=dtype_of(path[0].key, jnp.bfloat16))  # noqa: E731
    shapes = jax.tree_util.tree_map_with_path(dtype, nnx.to_pure_dict(state))
    params = placed(shapes, sharding.of_params(state, mesh))
    programs = Programs.of(config, graph, params, engine_config)
    empty = (
        jax.eval_shape(programs.empty_state, params)
        if name == "step"
        else jax.eval_shape(programs.empty_prefix)
    )
    state = placed(empty, sharding.of_state(empty, mesh))
    language = state.language if name == "step" else state
    rest = dataclasses.replace(language, llm=None, speech=None)
    kinds = {
        "parameters, frozen": params,
        "caches": (language.llm, language.speech),
        "other state": rest,
    }
    if name == "step":
        work = sum(part.flops for part in roofline.step(config, params, engine_config).values())
        kinds["flow and vocoder"] = (state.flow, state.vocoder)
        return Job(programs.step, (params, state), kinds, work)
    piece = prompt(config, engine_config, mesh)
    work = roofline.decoder_pass(
        config.llm, params["llm"], 0, engine_config.prefill_size, engine_config.llm_capacity
    ).flops
    return Job(programs.prefill, (params, state), kinds | {"prompt": piece}, work, piece)


def prompt(config: Omni2Config, engine_config: EngineConfig, mesh: Mesh) -> dict:
    """Shapes of the keyword arguments of `streaming_step.prefill`."""

    def shape(dtype: jnp.dtype, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding.replicated(mesh))

    features = config.speech_positions
    return {
        "ids": shape(jnp.int32, engine_config.prefill_size),
        "length": shape(jnp.int32),
        "features": shape(jnp.bfloat16, features, config.llm.width),
        "first": shape(jnp.int32),
        "request": jax.tree.map(
            lambda leaf: shape(leaf.dtype, *leaf.shape),
            jax.eval_shape(lambda: Request.of(config, Options())),
        ),
    }


def compiled(job: Job, mesh: Mesh) -> dict:
    """Compile it; bytes of a device by kind and in all, what its collectives move, and the seconds it took."""
    kinds = {kind: share(tree) for kind, tree in job.kinds.items()}
    found = {"bytes": kinds, "flops": job.flops}
    start = time.perf_counter()
    with sharding.use(mesh):
        lowered = job.function.lower(*job.arguments, **job.keywords)
    lowering = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (peak := wanted(str(error))) is None:
            raise
        exceeded = {"peak": peak, "fits": False}
        return found | exceeded | {"compile_s": time.perf_counter() - lowering}
    memory, moved = program.memory_analysis(), collectives(program.as_text())
    return found | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": dict(moved.bytes),
        "open_loops": moved.open_loops,
        "lower_s": lowering - start,
        "compile_s": time.perf_counter() - lowering,
    }


def wanted(message: str) -> float | None:
    """Bytes that XLA says a program would take, where it refuses to compile it for their sake: of all, or of temporaries alone."""
    if not (
        found := re.search(
            r"Used ([\d.]+)([MG]) of|temporaries \(([\d.]+)([MG])\) exceeds", message
        )
    ):
        return None
    size, unit = (group for group in found.groups() if group)
    return float(size) * (GIB if unit == "G" else 2**20)


def job_of(
    name: str, config: Omni2Config, mesh: Mesh, batch: int | None, changes: Sequence[str]
) -> Job:
    """Raises ValueError for a mesh that divides neither the model nor the batch, and for settings there are not."""
    sharding.check(mesh, config.llm.width, config.llm.hidden)
    if name in STREAMING:
        return streaming(name, shaped(batch or 64, changes), config, mesh)
    train = overrides.changed(TRAINING[name], [*([f"batch={batch}"] if batch else []), *changes])
    sharding.check_rows(mesh, train.batch, train.microbatches)
    return training(train, config, mesh)


def shaped(slots: int, changes: Sequence[str]) -> EngineConfig:
    """What an engine for many speakers is compiled for."""
    engine_config = EngineConfig(slots=slots, flow_chunk=10, flow_left_chunks=3)
    for key, _, text in (change.partition("=") for change in changes):
        if not hasattr(engine_config, key):
            known = [field.name for field in dataclasses.fields(EngineConfig)]
            raise ValueError(
                f"--set {key}: EngineConfig has no {key!r}{overrides.nearest(key, known)}"
            )
        engine_config = dataclasses.replace(engine_config, **{key: overrides.literal(text)})
    return engine_config


def report(title: str, found: dict) -> None:
    """The same figures as a table."""
    table, gib = (
        rich.table.Table("of a device", "GiB", title=title),
        lambda size: f"{size / GIB:.3f}",
    )
    rows = {kind: gib(size) for kind, size in found["bytes"].items()}
    if "temporaries" in found:
        rows |= {
            "all of these as XLA lays them out": gib(found["arguments"]),
            "temporaries": gib(found["temporaries"]),
        }
    rows |= {
        "peak": gib(found["peak"]),
        "memory of the device": f"{found['hbm'] / GIB:g}: {'fits' if found['fits'] else 'does not fit'}",
    }
    for kind, size in found.get("collectives", {}).items():
        rows[f"{kind}, output of a call"] = gib(size)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    loops = (
        f"; {n} loops whose turns the data decide counted once"
        if (n := found.get("open_loops"))
        else ""
    )
    console.print(
        f"{found['flops'] / 1e12:.3f} TFLOP on all devices, counted from shapes; compiled in {found['compile_s']:.0f} s{loops}"
    )


def main(
    topology: Annotated[str, typer.Option(help=f"The slice: {WORKING} work.")],
    size: Annotated[str, typer.Option(help=f"Dimensions, one of {', '.join(SIZES)}.")],
    job: Annotated[
        str,
        typer.Option(
            help="train (stage I(a)), train2 (stage II), prefill (of a turn) or step (of all slots)."
        ),
    ],
    mesh: Annotated[
        str, typer.Option(help="fsdp=4,tensor=2; without fsdp, that is the rest of the devices.")
    ] = "replica=1",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows, or slots. [default: the stage's own, 64 slots]")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting of the stage, or of the EngineConfig.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Compile a job for a slice of TPUs that is not there."""
    config = sizes.of(size)
    if job not in (*TRAINING, *STREAMING):
        raise ValueError(
            f"there is no job {job!r}; it is one of {', '.join((*TRAINING, *STREAMING))}"
        )
    there = devices(topology)
    where = sharding.parse_mesh(mesh, there)
    found = compiled(job_of(job, config, where, batch, changes or []), where)
    hbm = MEMORY_GIB[there[0].device_kind] * GIB
    found |= {"hbm": hbm, "fits": found.get("fits", found["peak"] <= hbm)}
    named = (
        ", ".join(f"{axis}={count}" for axis, count in where.shape.items() if count > 1)
        or "one device"
    )
    report(f"{job} of {size} on {topology}: {named}", found)
    if json_file:
        given = {
            "topology": topology,
            "size": size,
            "job": job,
            "mesh": dict(where.shape),
            "batch": batch,
            "set": changes or [],
        }
        json_file.write_text(json.dumps(given | found, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

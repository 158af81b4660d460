"""`python -m benchmarks.aot`: compile for a TPU slice or an H100 without having one.

It reports the memory, FLOPs and collectives of the compiled program, and for a GPU the kernels and
bytes of each part beside the fewest bytes that it can move (`least.py`). Nothing is allocated: all
inputs are shapes with shardings. The programs are those of train/step.py and of the engine. Sizes
are of one device, FLOPs of all devices.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import kernels, least, roofline, sizes
from benchmarks.aot_report import GIB, report
from benchmarks.hlo import collectives
from benchmarks.sizes import SIZES, dtype_of
from benchmarks.targets import GPUS, KNOWN_SLICES, devices
from omni2_jax import sharding
from omni2_jax.config import Omni2Config
from omni2_jax.configs import stage1a, stage2
from omni2_jax.console import run_function
from omni2_jax.devices import memory_gib
from omni2_jax.generate.engine import Programs
from omni2_jax.generate.engine_config import EngineConfig
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import Request
from omni2_jax.models import forms
from omni2_jax.models.model import Model, abstract_state
from omni2_jax.train import flops, overrides, step
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.weights import split_params, stage_weights

TRAINING = {"train": stage1a.config, "train2": stage2.config}
STREAMING = ("prefill", "step")
LIVE = 600  # positions of a conversation: a question of 30 s, its prompt, and half of an answer
STEPS = 1000  # length of the learning rate schedule; it changes constants only


@dataclass(frozen=True)
class Job:
    """A jitted function and the shapes of its arguments; what it has to do, by its shapes."""

    function: Any  # of jax.jit
    arguments: tuple
    kinds: dict[str, Any]  # the shapes by kind
    flops: float
    parts: dict[str, least.Part]
    label: kernels.Label  # the part of an instruction
    keywords: dict[str, object] = field(default_factory=dict)
    live: int = LIVE  # positions in the language models' caches

    def events(self, text: str) -> Iterator[kernels.Event]:
        """What its compiled program runs with so many live positions."""
        return kernels.events(text, self.label, lambda name, _: least.iterations(name, self.live))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the shardings of another tree."""
    return jax.tree.map(lambda leaf, spec: leaf.update(sharding=spec), shapes, shardings)


def share(tree) -> int:
    """Bytes of one device's shards of a tree of shapes, without the padding of tiles."""
    return sum(
        roofline.size(leaf.update(shape=leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
    )


def training(train: TrainConfig, config: Omni2Config, mesh: Mesh) -> Job:
    """One optimizer step of a stage, with the first of its buckets."""
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
    state = with_shardings(jax.eval_shape(objective.initial, trained), shardings)
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.RULES["batch"]))
    data: Any = None  # an empty row has nothing of it
    empty = stage.example_type(train, config, None, data).empty(bucket)
    cut = (train.microbatches, train.batch // train.microbatches)
    batch = {
        name: jax.ShapeDtypeStruct((*cut, *value.shape), value.dtype, sharding=rows)
        for name, value in empty.items()
    }
    kinds = {
        "parameters, trained": state.params,
        "parameters, frozen": frozen,
        "optimizer": (state.opt, state.ema),
        "batch": batch,
    }
    return Job(
        step.compile_step(objective, shardings),
        (state, frozen, batch),
        kinds,
        flops.step(stage, config, weights.shapes, bucket),
        least.of_training(kinds, train.microbatches),
        least.training_label,
    )


def streaming(
    name: str, engine_config: EngineConfig, config: Omni2Config, mesh: Mesh, live: int = LIVE
) -> Job:
    """A program of the engine: "step", for all slots, or "prefill", for a piece of a prompt.

    live: positions in the language models' caches, of which a step reads the keys and values.
    """
    config = config.replace(speaker=None)
    form = forms.form_of(mesh.devices.flat[0].platform, mesh)
    graph, state = abstract_state(config, lambda *given: forms.arrange(Model(*given), form))

    def with_dtype(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.dtype != jnp.float32:
            return leaf  # as its form has it
        return leaf.update(dtype=dtype_of(path[0].key, jnp.bfloat16))

    shapes = jax.tree_util.tree_map_with_path(with_dtype, nnx.to_pure_dict(state))
    params = with_shardings(shapes, sharding.of_params(state, mesh))
    programs = Programs.of(config, graph, params, engine_config)
    empty = (
        jax.eval_shape(programs.empty_state, params)
        if name == "step"
        else jax.eval_shape(programs.empty_prefix)
    )
    state = with_shardings(empty, sharding.of_state(empty, mesh))
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
        parts = least.of_step(config, params, engine_config, live)
        return Job(programs.step, (params, state), kinds, work, parts, least.label, live=live)
    piece = prompt(config, engine_config, mesh)
    work = roofline.decoder_pass(
        config.llm, params["llm"], 0, engine_config.prefill_size, engine_config.llm_capacity
    ).flops
    kinds["prompt"] = piece
    parts = least.of_prefill(config, params, engine_config)
    label, live = (lambda name: "prefill"), engine_config.prefill_size
    return Job(programs.prefill, (params, state), kinds, work, parts, label, piece, live)


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


def compiled(job: Job, mesh: Mesh, largest: int = 0) -> dict:
    """Compile a job -> its figures: bytes of one device, FLOPs, bytes of collectives, seconds.

    On a GPU also what each part moves, and the `largest` instructions by what they move.
    A program that does not fit the device's memory has the figures that XLA's message states.
    """
    kinds = {kind: share(tree) for kind, tree in job.kinds.items()}
    figures = {"bytes": kinds, "flops": job.flops}
    start = time.perf_counter()
    with sharding.use(mesh):
        lowered = job.function.lower(*job.arguments, **job.keywords)
    lowering = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (peak := required_bytes(str(error))) is None:
            raise
        exceeded = {"peak": peak, "fits": False}
        return figures | exceeded | {"compile_s": time.perf_counter() - lowering}
    memory, text = program.memory_analysis(), program.as_text()
    communication = collectives(text)
    if mesh.devices.flat[0].platform == "gpu":
        figures["parts"] = traffic(text, job, mesh.size)
        figures["largest"] = [
            {"part": part, "instruction": what, "kernels": one.kernels, "bytes": one.bytes}
            for part, what, one in kernels.largest(job.events(text), largest)
        ]
    return figures | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": dict(communication.bytes),
        "open_loops": communication.open_loops,
        "lower_s": lowering - start,
        "compile_s": time.perf_counter() - lowering,
    }


def traffic(text: str, job: Job, devices: int = 1) -> dict[str, dict]:
    """What each part of a compiled program moves in one pass, beside the least that it can.

    The least of one of several devices is an even share.
    """
    found = kernels.by_part(job.events(text))
    rows = {}
    for name, part in job.parts.items():
        one = found.pop(name, kernels.Traffic())
        rows[name] = {
            "passes": part.passes,
            "kernels": one.kernels / part.counted,
            "bytes": one.bytes / part.counted,
            "waits": one.waits / part.counted,
            "least_bytes": part.least / devices,
        }
    assert not found, f"parts without a least: {list(found)}"
    return rows


def required_bytes(message: str) -> float | None:
    """The bytes that a program would need, from XLA's refusal to compile it; None if it has none.

    XLA states the bytes of everything, or those of temporaries alone.
    """
    pattern = r"Used ([\d.]+)([MG]) of|temporaries \(([\d.]+)([MG])\) exceeds"
    match = re.search(pattern, message)
    if match is None:
        return None
    size, unit = (group for group in match.groups() if group)
    return float(size) * (GIB if unit == "G" else 2**20)


def job_of(
    name: str,
    config: Omni2Config,
    mesh: Mesh,
    batch: int | None,
    changes: Sequence[str],
    live: int = LIVE,
) -> Job:
    """The job of this name. live: see `streaming`.

    Raises ValueError if the mesh divides neither the model nor the batch, and for unknown settings.
    """
    sharding.check(mesh, config.llm.width, config.llm.hidden)
    if name in STREAMING:
        return streaming(name, shaped(batch or 64, changes), config, mesh, live)
    train = overrides.changed(TRAINING[name], [*([f"batch={batch}"] if batch else []), *changes])
    sharding.check_rows(mesh, train.batch, train.microbatches)
    return training(train, config, mesh)


def shaped(slots: int, changes: Sequence[str]) -> EngineConfig:
    """The settings of an engine for many conversations, with `key=value` changes.

    Raises ValueError for a key that EngineConfig does not have.
    """
    engine_config = EngineConfig(slots=slots, flow_chunk=10, flow_left_chunks=3)
    for key, _, text in (change.partition("=") for change in changes):
        if not hasattr(engine_config, key):
            known = [field.name for field in dataclasses.fields(EngineConfig)]
            raise ValueError(
                f"--set {key}: EngineConfig has no {key!r}{overrides.nearest(key, known)}"
            )
        engine_config = dataclasses.replace(engine_config, **{key: overrides.literal(text)})
    return engine_config


def main(
    topology: Annotated[
        str, typer.Option(help=f"The slice ({KNOWN_SLICES} work), or {' or '.join(GPUS)}.")
    ],
    size: Annotated[str, typer.Option(help=f"Dimensions, one of {', '.join(SIZES)}.")],
    job: Annotated[
        str,
        typer.Option(
            help="train: stage 1a; train2: stage 2; prefill: of a turn; step: of all slots."
        ),
    ],
    mesh: Annotated[
        str, typer.Option(help="As fsdp=4,tensor=2; fsdp is the rest of the devices by default.")
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
    live: Annotated[
        int, typer.Option(min=1, help="Positions in the caches that a step reads, for a GPU.")
    ] = LIVE,
    largest: Annotated[
        int, typer.Option(min=0, help="Print so many instructions that move most, for a GPU.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Compile a job for a TPU slice or an H100 without having one."""
    config = sizes.of(size)
    if job not in (*TRAINING, *STREAMING):
        raise ValueError(
            f"--job {job!r} does not exist; expected one of {', '.join((*TRAINING, *STREAMING))}"
        )
    slice_devices = devices(topology)
    device_mesh = sharding.parse_mesh(mesh, slice_devices)
    made = job_of(job, config, device_mesh, batch, changes or [], live)
    figures = compiled(made, device_mesh, largest)
    hbm = (memory_gib(slice_devices[0]) or 0) * GIB
    figures |= {"hbm": hbm, "fits": figures.get("fits", figures["peak"] <= hbm)}
    axes = [f"{axis}={count}" for axis, count in device_mesh.shape.items() if count > 1]
    report(f"{job} of {size} on {topology}: {', '.join(axes) or 'one device'}", figures)
    if json_file:
        settings = {
            "topology": topology,
            "size": size,
            "job": job,
            "mesh": dict(device_mesh.shape),
            "batch": batch,
            "set": changes or [],
        }
        json_file.write_text(json.dumps(settings | figures, indent=1) + "\n")


if __name__ == "__main__":
    run_function(main)

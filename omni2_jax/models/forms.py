"""The form of a model to generate with: how its layers lie in memory, by kind of device.

A loop over stacked layers slices the weights and the cache of each layer out of arrays of all
layers. A CPU and XLA's GPU compiler copy every such slice before they use it, and a GPU launches a
kernel for each; a TPU reads it where it lies. So CPUs and GPUs get the parameters and the cache of
each layer as arrays of their own, and run the layers one after the other, which is slower to
compile. A CPU gets int8 matrices as floats, since XLA would convert all of them in every step.

A GPU also gets matrices that have the same input as one, since each matmul is a launch, or several,
and matrices and the kernels of convolutions in the order in which it reads them. It runs the flow's
estimator, which moves most bytes of a step with many conversations, with matrices, activations,
keys and values in bfloat16; norms, softmax, residual sums, convolutions and the solver stay in
float32, as do encoder and vocoder. benchmarks/AOT.md has the figures.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
from flax import nnx

from omni2_jax import sharding
from omni2_jax.models.flow import estimator
from omni2_jax.models.fusing import Fusing
from omni2_jax.models.layers import Conv1d, Embedding, Linear
from omni2_jax.models.stacks import is_unrolled, unstack

if TYPE_CHECKING:
    from omni2_jax.models.model import Model


@dataclass(frozen=True)
class Form:
    """How a model lies in memory to generate with. All forms compute the same but for rounding."""

    unrolled: bool = False  # the language models' layers and the flow's stages are listed
    blocks: bool = False  # the flow's transformer blocks are listed, too
    listed_caches: bool = False  # each layer of the language models has a cache of its own
    # Matrices with the same input are one: queries, keys and values, ...; so are a stage's first
    # convolution in the flow and the skip connection beside it.
    fused: bool = False
    transposed: bool = False  # the language models' matrices are [out, in] (`Linear.transpose`)
    flow_matmuls: str = "float32"  # dtype of those of the flow's estimator (`Block.multiply_in`)
    by_head: bool = False  # the estimator's attention, of few frames (`estimator.Attention`)
    convs_transposed: bool = False  # kernels of flow and vocoder: `Conv1d.transpose`
    float_weights: bool = False  # int8 matrices are multiplied by their scales (`Linear.to_float`)
    search_bits: int = 1  # of a sampling threshold that a pass decides (`sampling.truncate`)


STACKED = Form()
FORMS = {
    "cpu": Form(unrolled=True, listed_caches=True, float_weights=True),
    "gpu": Form(
        unrolled=True,
        blocks=True,
        listed_caches=True,
        fused=True,
        transposed=True,
        flow_matmuls="bfloat16",
        by_head=True,
        convs_transposed=True,
        search_bits=4,
    ),
}


def form_of(backend: str, mesh=None) -> Form:
    """The form for a kind of device: "cpu", "gpu" or "tpu".

    On a mesh whose `tensor` axis cuts matrices, those of queries, keys and values stay apart: one
    matrix of all of them would be cut across their borders. The vocabulary is cut, too, and sums
    over it are partitioned one by one only.
    """
    form = FORMS.get(backend, STACKED)
    if mesh is not None and mesh.shape["tensor"] > 1:
        return dataclasses.replace(form, fused=False, search_bits=1)
    return form


def arrange(model: "Model", form: Form, donate: bool = False) -> "Model":
    """Bring a model, as it was read from a checkpoint, into a form. It changes the model itself.

    donate: whether arrays may be deleted that are replaced (`layers.freed`).
    """
    flow, modules = model.flow, [module for _, module in nnx.iter_modules(model)]
    if form.float_weights:
        for module in modules:
            if isinstance(module, (Linear, Embedding)):
                module.to_float(donate)
    if form.fused:
        for module in modules:
            if isinstance(module, Fusing):
                module.fuse(donate)
            if isinstance(module, estimator.Stage):
                module.join_skip(donate)
    model.form = form
    for decoder in (model.llm, model.speech_lm):
        if decoder is None:
            continue
        if form.transposed:
            for _, module in nnx.iter_modules(decoder.layers):
                if isinstance(module, Linear):
                    module.transpose(donate)
        if form.unrolled:
            decoder.layers = unstack(decoder.layers, donate)
    if flow is not None and form.by_head:
        for _, module in nnx.iter_modules(flow.estimator):
            if isinstance(module, estimator.Attention):
                module.by_head = True
    if form.convs_transposed:
        for part in (flow, model.vocoder):
            for _, module in nnx.iter_modules(part) if isinstance(part, nnx.Module) else ():
                if isinstance(module, Conv1d):
                    module.transpose(donate)
    if flow is not None and form.flow_matmuls != "float32":
        for _, module in nnx.iter_modules(flow.estimator):
            if isinstance(module, estimator.Block):
                module.multiply_in(form.flow_matmuls, donate)
    if form.unrolled and flow is not None:
        flow.estimator.middle = unstack(flow.estimator.middle, donate)
    if form.blocks and flow is not None:
        flow.encoder.blocks = unstack(flow.encoder.blocks, donate)
        flow.encoder.up_blocks = unstack(flow.encoder.up_blocks, donate)
        assert is_unrolled(flow.estimator.middle), "blocks are listed in stages that are listed"
        for stage in (flow.estimator.down, *flow.estimator.middle, flow.estimator.up):
            stage.blocks = unstack(stage.blocks, donate)
    return model


def for_serving(
    graph: nnx.GraphDef, params: dict, form: Form | None = None, donate: bool = False
) -> tuple[nnx.GraphDef, dict]:
    """The graph and parameters of a model in a form; None: that of this process's devices.

    donate: whether the given parameters may be deleted where new ones replace them. Otherwise both
    are in memory until the caller drops the former.
    """
    form = form or form_of(jax.default_backend(), sharding.mesh_of(params))
    if form == STACKED:
        return graph, params
    graph, state = nnx.split(arrange(nnx.merge(graph, params), form, donate))
    return graph, nnx.to_pure_dict(state)

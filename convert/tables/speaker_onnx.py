"""The released campplus.onnx -> tensors under 3D-Speaker's torch names, for the table in speaker.py.

Names come from the graph alone. Its nodes are in topological order and the network is a chain, but for the head's
shortcuts and the local convolutions of the context masks, which their kernel sizes tell apart.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from omni2_jax.convert.formats import Tensor
from omni2_jax.convert.plan import ConversionError, Source
from omni2_jax.convert.tables.speaker import EPS, NORM, full, head

Named = Iterator[tuple[str, Source]]
Node = tuple[str, list[Source]]  # operator and constant inputs


def from_onnx(tensors: Mapping[str, Source], where: str) -> dict[str, Source]:
    """The tensors that `convert.sources.onnx_file` finds, renamed; ConversionError if the graph is not CAM++'s."""
    uses = itertools.groupby(tensors.items(), lambda item: item[0].rpartition(".")[0])
    nodes = [(node.split(".")[1], [tensor for _, tensor in inputs]) for node, inputs in uses]
    flat = [
        inputs for operator, inputs in nodes if operator == "Conv" and len(inputs[0].shape) == 4
    ]
    trunk = [
        node
        for node in nodes
        if node[0] == "BatchNormalization" or (node[0] == "Conv" and len(node[1][0].shape) == 3)
    ]
    try:
        return dict(itertools.chain(named_head(flat), named_trunk(trunk)))
    except ValueError as error:
        raise ConversionError(
            f"{where} is not the graph of a CAM++ speaker encoder with folded normalisations: {error}"
        ) from None


def named(prefix: str, parts: Sequence[str], tensors: Sequence[Source]) -> Named:
    return ((f"{prefix}.{part}", tensor) for part, tensor in zip(parts, tensors, strict=True))


def unfolded(conv: str, norm: str, inputs: Sequence[Source]) -> Named:
    """A convolution with its normalisation folded in, as a convolution and a normalisation that only adds the bias."""
    weight, bias = inputs
    (size,) = bias.shape

    def constant(value: float) -> Source:
        return Tensor((size,), np.dtype(np.float32), lambda: full(size, value))

    yield f"{conv}.weight", weight
    yield from named(norm, NORM, [constant(1), bias, constant(0), constant(1 - EPS)])


def named_head(convs: list[list[Source]]) -> Named:
    """The 2-D convolutions; both lists are in the order of the graph, so only the shortcuts are moved out of the way."""
    names = sorted(head(), key=lambda name: "shortcut" in name[0])
    convs = sorted(convs, key=lambda inputs: inputs[0].shape[2:] == (1, 1))
    for (conv, norm, _), inputs in zip(names, convs, strict=True):
        yield from unfolded(conv, norm, inputs)


def named_trunk(nodes: list[Node]) -> Named:
    """The 1-D convolutions. Each normalisation that is left opens a dense layer, a transition, or closes the network."""
    stages: list[list[list[Source]]] = [[]]
    for operator, inputs in nodes:
        if operator == "BatchNormalization":
            stages.append([])
        stages[-1].append(inputs)
    (first,), *stages = stages
    yield from unfolded("xvector.tdnn.linear", "xvector.tdnn.nonlinear.batchnorm", first)
    block, layer = 1, 1
    for norm, *convs in stages:
        transit = f"xvector.transit{block}"
        match convs:
            case [reduction, *context] if len(context) == 3:
                yield from named_dense(
                    f"xvector.block{block}.tdnnd{layer}", norm, reduction, context
                )
                layer += 1
            case [[weight]]:
                yield from named(f"{transit}.nonlinear.batchnorm", NORM, norm)
                yield f"{transit}.linear.weight", weight
                block, layer = block + 1, 1
            case [last, [weight]]:
                yield from named(f"{transit}.nonlinear.batchnorm", NORM, norm)
                yield from unfolded(f"{transit}.linear", "xvector.out_nonlinear.batchnorm", last)
                yield "xvector.dense.linear.weight", weight
            case []:
                yield from named(
                    "xvector.dense.nonlinear.batchnorm", NORM[2:], without_affine(norm)
                )
            case _:
                raise ValueError(f"{len(convs)} convolutions behind a batch normalisation")


def named_dense(
    source: str, norm: list[Source], reduction: list[Source], context: list[list[Source]]
) -> Named:
    """One densely connected layer; of the context mask's three convolutions the local one is wider than a frame."""
    (local,), down, up = sorted(context, key=lambda inputs: inputs[0].shape[2] == 1)
    yield from named(f"{source}.nonlinear1.batchnorm", NORM, norm)
    yield from unfolded(f"{source}.linear1", f"{source}.nonlinear2.batchnorm", reduction)
    yield f"{source}.cam_layer.linear_local.weight", local
    for name, inputs in (("linear1", down), ("linear2", up)):
        yield from named(f"{source}.cam_layer.{name}", ("weight", "bias"), inputs)


def without_affine(norm: list[Source]) -> list[Source]:
    """Mean and variance of the last normalisation; ONNX writes out the weight of 1 and the bias of 0 that it lacks in torch."""
    weight, bias, mean, variance = norm
    if np.any(weight.read() != 1) or np.any(bias.read() != 0):
        raise ValueError("its last batch normalisation has a weight or a bias")
    return [mean, variance]

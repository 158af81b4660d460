"""campplus.onnx -> tensors under 3D-Speaker's torch names, for the table in speaker.py.

Names come from the graph alone. Its nodes are in topological order, and the network is a chain
except for the head's shortcuts and the local convolutions of the context masks; their kernel sizes
tell them apart.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.tables.speaker import EPS, NORM, full, head

Named = Iterator[tuple[str, LazyArray]]
Node = tuple[str, list[LazyArray]]  # operator and constant inputs


def from_onnx(tensors: Mapping[str, LazyArray], context: str) -> dict[str, LazyArray]:
    """The tensors of `formats.onnx_file`, renamed.

    Raises ConversionError, which starts with `context`, if the graph is not CAM++'s.
    """
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
            f"{context} is not the graph of a CAM++ speaker encoder "
            f"with folded normalisations: {error}"
        ) from None


def named(prefix: str, parts: Sequence[str], tensors: Sequence[LazyArray]) -> Named:
    """Tensors under the names `prefix`.`part`. Raises ValueError if there are not as many."""
    return ((f"{prefix}.{part}", tensor) for part, tensor in zip(parts, tensors, strict=True))


def unfolded(conv: str, norm: str, inputs: Sequence[LazyArray]) -> Named:
    """A convolution with a folded normalisation, as a convolution and a normalisation.

    The normalisation only adds the bias.
    """
    weight, bias = inputs
    (size,) = bias.shape

    def constant(value: float) -> LazyArray:
        return LazyArray((size,), np.dtype(np.float32), lambda: full(size, value))

    yield f"{conv}.weight", weight
    yield from named(norm, NORM, [constant(1), bias, constant(0), constant(1 - EPS)])


def named_head(convs: list[list[LazyArray]]) -> Named:
    """The 2-D convolutions. Both lists are in the order of the graph, except for the shortcuts,
    which are put last."""
    names = sorted(head(), key=lambda name: "shortcut" in name[0])
    convs = sorted(convs, key=lambda inputs: inputs[0].shape[2:] == (1, 1))
    for (conv, norm, _), inputs in zip(names, convs, strict=True):
        yield from unfolded(conv, norm, inputs)


def named_trunk(nodes: list[Node]) -> Named:
    """The 1-D convolutions. Each normalisation that is left begins a dense layer or a transition,
    or is the last of the network."""
    stages: list[list[list[LazyArray]]] = [[]]
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
    source: str, norm: list[LazyArray], reduction: list[LazyArray], context: list[list[LazyArray]]
) -> Named:
    """One densely connected layer. Of the context mask's three convolutions only the local one has
    a kernel of more than one frame."""
    (local,), down, up = sorted(context, key=lambda inputs: inputs[0].shape[2] == 1)
    yield from named(f"{source}.nonlinear1.batchnorm", NORM, norm)
    yield from unfolded(f"{source}.linear1", f"{source}.nonlinear2.batchnorm", reduction)
    yield f"{source}.cam_layer.linear_local.weight", local
    for name, inputs in (("linear1", down), ("linear2", up)):
        yield from named(f"{source}.cam_layer.{name}", ("weight", "bias"), inputs)


def without_affine(norm: list[LazyArray]) -> list[LazyArray]:
    """Mean and variance of the last normalisation.

    In torch it has no weight and no bias; ONNX writes 1 and 0. Raises ValueError for other numbers.
    """
    weight, bias, mean, variance = norm
    if np.any(weight.read() != 1) or np.any(bias.read() != 0):
        raise ValueError("its last batch normalisation has a weight or a bias")
    return [mean, variance]

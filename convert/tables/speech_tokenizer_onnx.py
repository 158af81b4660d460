"""speech_tokenizer_v2.onnx -> tensors under s3tokenizer's names, for speech_tokenizer.py's table.

Names come from the graph alone: its nodes are in topological order, and its weights form a chain
except for the memories, which are the only convolutions behind the first two.
"""

import itertools
from collections.abc import Iterator, Mapping

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.convert.plan import ConversionError

Node = tuple[str, list[LazyArray]]  # operator and weights

RANK = {"Conv": 3, "MatMul": 2, "Add": 1, "LayerNormalization": 1}  # of the first weight


def from_onnx(tensors: Mapping[str, LazyArray], context: str) -> dict[str, LazyArray]:
    """The tensors of `formats.onnx_file`, renamed.

    Raises ConversionError, which starts with `context`, if the graph is not the tokenizer's.
    """
    uses = itertools.groupby(tensors.items(), lambda item: item[0].rpartition(".")[0])
    nodes = [(node.split(".")[1], [tensor for _, tensor in inputs]) for node, inputs in uses]
    nodes = [node for node in nodes if has_weights(*node)]
    convs = [node for node in nodes if node[0] == "Conv"]
    chain = convs[:2] + [node for node in nodes if node[0] != "Conv"] + convs[2:]
    try:
        return dict(
            itertools.chain.from_iterable(
                itertools.starmap(named, zip(expected(len(convs) - 2), chain, strict=True))
            )
        )
    except ValueError as error:
        raise ConversionError(
            f"{context} is not the graph of speech tokenizer v2: {error}"
        ) from None


def has_weights(operator: str, tensors: list[LazyArray]) -> bool:
    """Whether a node's constants are weights, not a mask, a shape or a single number."""
    return len(tensors[0].shape) == RANK.get(operator) and tensors[0].shape != (1,)


def expected(layers: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Operator, module and parameters of every node with weights: the chain, then the memories."""
    both = ("weight", "bias")
    yield "Conv", "encoder.conv1", both
    yield "Conv", "encoder.conv2", both
    for block in (f"encoder.blocks.{i}" for i in range(layers)):
        yield "LayerNormalization", f"{block}.attn_ln", both
        yield from linear(f"{block}.attn.query")
        yield "MatMul", f"{block}.attn.key", ("weight",)
        yield from linear(f"{block}.attn.value")
        yield from linear(f"{block}.attn.out")
        yield "LayerNormalization", f"{block}.mlp_ln", both
        yield from linear(f"{block}.mlp.0")
        yield from linear(f"{block}.mlp.2")
    yield from linear("quantizer._codebook.project_down")
    for i in range(layers):
        yield "Conv", f"encoder.blocks.{i}.attn.fsmn_block", ("weight",)


def linear(module: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The two nodes of a linear layer."""
    yield "MatMul", module, ("weight",)
    yield "Add", module, ("bias",)


def named(
    expected_node: tuple[str, str, tuple[str, ...]], node: Node
) -> Iterator[tuple[str, LazyArray]]:
    """A node's weights under torch names; torch has a linear layer's matrix transposed.

    Raises ValueError if the node has another operator.
    """
    operator, module, parameters = expected_node
    if node[0] != operator:
        raise ValueError(f"{module} is {node[0]}, expected {operator}")
    for parameter, tensor in zip(parameters, node[1], strict=True):
        yield f"{module}.{parameter}", transposed(tensor) if operator == "MatMul" else tensor


def transposed(tensor: LazyArray) -> LazyArray:
    """[A, B] -> [B, A], as lazy as before."""
    return LazyArray(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().transpose())

"""CAM++ <-> `models.speaker.Speaker`. Reference: `CAMPPlus` of 3D-Speaker.

The source is 3D-Speaker's state dict, or the released campplus.onnx under its names. Batch
normalisations have fixed statistics and are folded; backwards they come out as identities, with
mean 0 and variance 1 - eps. The ONNX exporter has folded most of them already, and speaker_onnx.py
gives names to what is left.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.config import SpeakerConfig
from omni2_jax.convert.json_files import checked
from omni2_jax.convert.plan import ConversionError, Rule, Table, Transform, conv

EPS = 1e-5  # of every batch normalisation
NORM = ("weight", "bias", "running_mean", "running_var")  # in the order of ONNX's inputs

# torch weight <-> kernel, channels last
conv2d = Transform(lambda x, shape: x.transpose(3, 2, 1, 0), lambda y: (y.transpose(3, 2, 1, 0),))
pointwise = Transform(
    lambda x, shape: x.transpose().reshape(shape),
    lambda y: (y.transpose().reshape(y.shape[1], y.shape[0], 1),),
)


def unflattened(channels: int) -> Transform:
    """The first convolution behind the head: [channel, mel] in torch, [mel, channel] here."""

    def forward(x, shape):
        out, inputs, width = x.shape
        return (
            x.reshape(out, channels, inputs // channels, width).transpose(3, 2, 1, 0).reshape(shape)
        )

    def backward(y):
        width, inputs, out = y.shape
        return (
            y.reshape(width, inputs // channels, channels, out)
            .transpose(3, 2, 1, 0)
            .reshape(out, inputs, width),
        )

    return Transform(forward, backward)


# ---- batch normalisation ----


def gain(variance: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """The factor [C] by which a normalisation with this variance and weight multiplies."""
    return weight * (variance.astype(np.float64) + EPS) ** -0.5


def full(size: int, value: float) -> np.ndarray:
    """[size], float32."""
    return np.full(size, value, np.float32)


def scaled(layout: Transform) -> Transform:
    """(weight, norm variance, norm weight) <-> kernel with the scale in it.

    The norm weight may be absent.
    """

    def backward(y):
        (x,) = layout.backward(y)
        return x, full(x.shape[0], 1 - EPS), full(x.shape[0], 1)

    return Transform(
        lambda x, *norm, shape: layout.forward(
            x * gain(*norm).reshape(-1, *[1] * (x.ndim - 1)), shape
        ),
        backward,
    )


# (variance, weight, mean, bias) <-> bias of the convolution in front
shifted = Transform(
    lambda variance, weight, mean, bias, shape: bias - mean * gain(variance, weight),
    lambda y: (full(y.shape[0], 1 - EPS), full(y.shape[0], 1), full(y.shape[0], 0), y),
)
# (variance, mean) <-> the same for a normalisation without weight and bias of its own
centred = Transform(
    lambda variance, mean, shape: -mean * gain(variance), lambda y: (full(y.shape[0], 1 - EPS), -y)
)
# (weight, bias, mean, variance) <-> scale and shift, where no convolution stands in front
affine = Transform(
    lambda weight, bias, mean, variance, shape: np.stack(
        [gain(variance, weight), bias - mean * gain(variance, weight)]
    ),
    lambda y: (y[0], y[1], full(y.shape[1], 0), full(y.shape[1], 1 - EPS)),
)


def folded(source: str, norm: str, target: str, layout: Transform = pointwise) -> Iterator[Rule]:
    """The rules of a convolution and the batch normalisation behind it."""
    weight, bias, mean, variance = (f"{norm}.{part}" for part in NORM)
    yield Rule((f"{source}.weight", variance, weight), f"{target}.kernel", scaled(layout))
    yield Rule((variance, weight, mean, bias), f"{target}.bias", shifted)


def output() -> Iterator[Rule]:
    """The rules of the last layer, whose batch normalisation has no weight and no bias."""
    *_, mean, variance = (f"xvector.dense.nonlinear.batchnorm.{part}" for part in NORM)
    kernel = scaled(pointwise)
    yield Rule(
        ("xvector.dense.linear.weight", variance),
        "out.kernel",
        Transform(kernel.forward, lambda y: kernel.backward(y)[:2]),
    )
    yield Rule((variance, mean), "out.bias", centred)


# ---- the table ----


def head() -> Iterator[tuple[str, str, str]]:
    """Convolution, normalisation and target of the 2-D head, in the order of the graph."""
    yield "head.conv1", "head.bn1", "head.conv1"
    for i, (layer, block) in enumerate(itertools.product((1, 2), (0, 1))):
        source, target = f"head.layer{layer}.{block}", f"head.blocks.{i}"
        yield from ((f"{source}.conv{k}", f"{source}.bn{k}", f"{target}.conv{k}") for k in (1, 2))
        if block == 0:
            yield f"{source}.shortcut.0", f"{source}.shortcut.1", f"{target}.shortcut"
    yield "head.conv2", "head.bn2", "head.conv2"


def dense(source: str, target: str) -> Iterator[Rule]:
    """The rules of one densely connected layer."""
    yield Rule(
        tuple(f"{source}.nonlinear1.batchnorm.{part}" for part in NORM),
        f"{target}.norm.rows",
        affine,
    )
    yield from folded(f"{source}.linear1", f"{source}.nonlinear2.batchnorm", f"{target}.down")
    yield Rule(f"{source}.cam_layer.linear_local.weight", f"{target}.context.local.kernel", conv)
    for theirs, ours in (("linear1", "down"), ("linear2", "up")):
        yield Rule(
            f"{source}.cam_layer.{theirs}.weight", f"{target}.context.{ours}.kernel", pointwise
        )
        yield Rule(f"{source}.cam_layer.{theirs}.bias", f"{target}.context.{ours}.bias")


def rules(config: SpeakerConfig) -> Iterator[Rule]:
    """The rules of the whole encoder."""
    for source, norm, target in head():
        yield from folded(source, norm, target, conv2d)
    yield from folded(
        "xvector.tdnn.linear",
        "xvector.tdnn.nonlinear.batchnorm",
        "tdnn",
        unflattened(config.head_channels),
    )
    for i, layers in enumerate(config.layers):
        for j in range(layers):
            yield from dense(f"xvector.block{i + 1}.tdnnd{j + 1}", f"blocks.{i}.layers.{j}")
        transit, target = f"xvector.transit{i + 1}", f"blocks.{i}"
        yield Rule(
            tuple(f"{transit}.nonlinear.batchnorm.{part}" for part in NORM),
            f"{target}.norm.rows",
            affine,
        )
        if i == len(config.layers) - 1:
            yield from folded(
                f"{transit}.linear", "xvector.out_nonlinear.batchnorm", f"{target}.transition"
            )
        else:
            yield Rule(f"{transit}.linear.weight", f"{target}.transition.kernel", pointwise)
    yield from output()


def table(config: SpeakerConfig) -> Table:
    """The table in torch names: 3D-Speaker's state dict, or `speaker_onnx.from_onnx`."""
    return Table(
        tuple(rules(config)), dropped={r".*\.num_batches_tracked": "only training counts batches"}
    )


def infer_config(source: Mapping[str, LazyArray], context: str) -> SpeakerConfig:
    """The dimensions, from the shapes of torch-named tensors.

    Raises ConversionError, which starts with `context`, if they are not CAM++'s.
    """
    try:
        head_channels = source["head.conv1.weight"].shape[0]
        channels, inputs, _ = source["xvector.tdnn.linear.weight"].shape
        bottleneck = source["xvector.block1.tdnnd1.linear1.weight"].shape[0]
        growth = source["xvector.block1.tdnnd1.cam_layer.linear_local.weight"].shape[0]
        embedding = source["xvector.dense.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ConversionError(
            f"{context} is not a CAM++ speaker encoder: {error} is missing or of another rank"
        ) from None
    names = [name.split(".") for name in source if name.endswith(".cam_layer.linear_local.weight")]
    first, second, third = (sum(name[1] == f"block{i}" for name in names) for i in (1, 2, 3))
    fields = {
        "mels": inputs // head_channels * 8,
        "embedding": embedding,
        "head_channels": head_channels,
        "channels": channels,
        "growth": growth,
        "bottleneck": bottleneck // growth,
        "layers": (first, second, third),
    }
    return checked(SpeakerConfig, context, fields)

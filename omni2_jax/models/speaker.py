"""CAM++ speaker encoder: fbank [B, T, M] -> x-vector [B, E].

B batch, T frames, M mel bins, C channels, S segments.

3D-Speaker's CAMPPlus (arXiv 2303.00332) for inference. The converter folds a batch normalization
after a convolution into it; one before a ReLU is a scale and a shift (`Affine`).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.audio import features
from omni2_jax.config import SpeakerConfig
from omni2_jax.models.layers import Conv1d, Linear, constant, inside, param

Array = jax.Array
relu = jax.nn.relu

SEGMENT = 100  # frames that share one local context
DILATIONS = (1, 2, 2)  # of the three dense blocks
# Over mel bins, of the head's residual blocks; the head's last convolution halves them once more.
HEAD_STRIDES = (2, 1, 2, 1)


class Conv2d(nnx.Module):
    """Convolution over time and mel bins, [B, T, M, C_in] -> [B, T, M / stride, C_out]."""

    def __init__(self, rngs: nnx.Rngs, size: int, inputs: int, outputs: int, stride: int = 1):
        self.stride, self.padding = stride, size // 2
        self.kernel = param(
            rngs, (size, size, inputs, outputs), (None,) * 4, fan_in=size * size * inputs
        )
        self.bias = param(rngs, (outputs,), (None,))

    def __call__(self, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(1, self.stride),
            padding=((self.padding, self.padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


class Affine(nnx.Module):
    """A batch normalization with fixed statistics: scale (row 0) and shift (row 1) per channel."""

    def __init__(self, channels: int):
        self.rows = constant((2, channels), (None, None), ((1.0,), (0.0,)))

    def __call__(self, x: Array) -> Array:
        scale, shift = self.rows[...].astype(x.dtype)
        return x * scale + shift


class Residual(nnx.Module):
    """Two convolutions and a shortcut, [B, T, M, C] -> [B, T, M / stride, C].

    Reference: 3D-Speaker's BasicResBlock.
    """

    def __init__(self, channels: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = Conv2d(rngs, 3, channels, channels, stride)
        self.conv2 = Conv2d(rngs, 3, channels, channels)
        self.shortcut = Conv2d(rngs, 1, channels, channels, stride) if stride > 1 else None

    def __call__(self, x: Array, mask: Array) -> Array:
        """mask [B, T, 1, 1]: 1 inside a row, 0 beyond its end."""
        y = self.conv2(relu(self.conv1(x)) * mask)
        return relu(y + (x if self.shortcut is None else self.shortcut(x))) * mask


class Head(nnx.Module):
    """2-D convolutions over time and frequency, [B, T, M] -> [B, T, M / 8 * C]."""

    def __init__(self, config: SpeakerConfig, rngs: nnx.Rngs):
        channels = config.head_channels
        self.conv1 = Conv2d(rngs, 3, 1, channels)
        self.blocks = nnx.List([Residual(channels, stride, rngs) for stride in HEAD_STRIDES])
        self.conv2 = Conv2d(rngs, 3, channels, channels, 2)

    def __call__(self, x: Array, mask: Array) -> Array:
        """mask [B, T, 1] zeroes frames beyond a row's end before each convolution over time."""
        mask = mask[..., None]
        x = relu(self.conv1(x[..., None] * mask)) * mask
        for block in self.blocks:
            x = block(x, mask)
        x = relu(self.conv2(x)) * mask
        return x.reshape(*x.shape[:2], -1)


class ContextMask(nnx.Module):
    """A convolution over time, gated by means over the row and over each segment (section 2.2)."""

    def __init__(self, inputs: int, outputs: int, dilation: int, rngs: nnx.Rngs):
        self.local = Conv1d(
            rngs, (3, inputs, outputs), dilation=dilation, padding=(dilation, dilation), bias=False
        )
        self.down = Linear(rngs, (inputs, inputs // 2), (None, None))
        self.up = Linear(rngs, (inputs // 2, outputs), (None, None))

    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B, T, C], zero beyond a row's end -> [B, T, outputs]."""
        totals, counts = segments(x).sum(2), segments(mask).sum(2)  # [B, S, C], [B, S, 1]
        mean = totals.sum(1, keepdims=True) / counts.sum(1, keepdims=True)
        context = mean + totals / jnp.maximum(counts, 1)
        gate = jax.nn.sigmoid(self.up(relu(self.down(context))))  # one per segment
        return self.local(x) * jnp.repeat(gate, SEGMENT, axis=1)[:, : x.shape[1]]


def segments(x: Array) -> Array:
    """[B, T, C] -> [B, S, 100, C]; the last segment is padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % SEGMENT), (0, 0)))
    return x.reshape(x.shape[0], -1, SEGMENT, x.shape[2])


class DenseLayer(nnx.Module):
    """[B, T, C] -> [B, T, growth], which `DenseBlock` appends to the layer's input."""

    def __init__(self, inputs: int, config: SpeakerConfig, dilation: int, rngs: nnx.Rngs):
        width = config.bottleneck * config.growth
        self.norm = Affine(inputs)
        self.down = Linear(rngs, (inputs, width), (None, None))
        self.context = ContextMask(width, config.growth, dilation, rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        return self.context(relu(self.down(relu(self.norm(x)))) * mask, mask)


class DenseBlock(nnx.Module):
    """Densely connected layers, then a transition that halves the channels.

    A layer's input is the block's input and the outputs of all layers before it.
    """

    def __init__(
        self,
        inputs: int,
        layers: int,
        config: SpeakerConfig,
        dilation: int,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        widths = [inputs + i * config.growth for i in range(layers + 1)]
        self.layers = nnx.List([DenseLayer(width, config, dilation, rngs) for width in widths[:-1]])
        self.norm = Affine(widths[-1])
        self.transition = Linear(rngs, (widths[-1], widths[-1] // 2), (None, None), bias=bias)

    def __call__(self, x: Array, mask: Array) -> Array:
        for layer in self.layers:
            x = jnp.concatenate([x, layer(x, mask)], -1)
        return self.transition(relu(self.norm(x)))


class Speaker(nnx.Module):
    """The network: 2-D head, three dense blocks over time, statistics pooling, a linear layer.

    `embed` runs it on samples.
    """

    def __init__(self, config: SpeakerConfig, rngs: nnx.Rngs):
        channels, last = config.channels, len(config.layers) - 1
        self.head = Head(config, rngs)
        self.tdnn = Conv1d(
            rngs, (5, config.mels // 8 * config.head_channels, channels), stride=2, padding=(2, 2)
        )
        self.blocks = nnx.List()
        for i, (layers, dilation) in enumerate(zip(config.layers, DILATIONS, strict=True)):
            # Only the last transition has a normalization after it, hence a bias.
            self.blocks.append(DenseBlock(channels, layers, config, dilation, i == last, rngs))
            channels = (channels + layers * config.growth) // 2
        self.out = Linear(rngs, (2 * channels, config.embedding), (None, None))

    def __call__(self, fbank: Array, lengths: Array) -> Array:
        """Mean-free fbank [B, T, M] -> x-vectors [B, E].

        lengths: [B] in frames, at least 3.
        """
        x = self.head(fbank, inside(lengths, fbank.shape[1])[..., None].astype(fbank.dtype))
        x = relu(self.tdnn(x))
        mask = inside((lengths + 1) // 2, x.shape[1])[..., None].astype(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(statistics(relu(x), mask))


def statistics(x: Array, mask: Array) -> Array:
    """Mean and unbiased standard deviation over time, [B, T, C] -> [B, 2C].

    mask: [B, T, 1], 1 for the frames that count.
    """
    count = mask.sum(1)
    mean = (x * mask).sum(1) / count
    variance = (jnp.square(x - mean[:, None]) * mask).sum(1) / (count - 1)
    return jnp.concatenate([mean, jnp.sqrt(variance)], -1)


def check_length(samples: int) -> None:
    """Raise ValueError if a voice prompt of so many samples at 16 kHz is too short."""
    if features.fbank_frames(samples) < 3:
        raise ValueError(
            f"a voice prompt of {samples} samples is too short; at least 720 (45 ms) are needed"
        )


def embed(speaker: Speaker, wav: Array, lengths: Array | None = None) -> Array:
    """x-vectors [B, E] of voice prompts [B, N] at 16 kHz in [-1, 1].

    lengths: [B] in samples, if they differ. Reference: the released front end's
    `_extract_spk_embedding`. Raises ValueError if N is under 720 samples (45 ms).
    """
    check_length(wav.shape[1])
    lengths = jnp.full(wav.shape[:1], wav.shape[1]) if lengths is None else lengths
    return _embed(*nnx.split(speaker), wav, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef, params: nnx.State, wav: Array, lengths: Array) -> Array:
    return nnx.merge(graph, params)(features.fbank(wav, lengths), features.fbank_frames(lengths))

"""CosyVoice's hift.pt <-> `models.vocoder.hift.Hift`. Reference: `HiFTGenerator` of CosyVoice.

Weight norm is folded, w = v * g / |v|; w comes back as g = |w|, v = w.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

from omni2_jax.config import HiftConfig
from omni2_jax.convert.plan import Rule, Table, Transform, conv, kernel
from omni2_jax.models.vocoder.hift import F0Predictor

T = TypeVar("T")

CONFIG = HiftConfig
FILE: str = "hift.pt"
FIELDS: dict[str, str] = {  # field of HiftConfig -> where a decoder's yaml states it
    "mels": "hift.in_channels",
    "channels": "hift.base_channels",
    "harmonics": "hift.nb_harmonics",
    "sample_rate": "hift.sampling_rate",
    "sine_amplitude": "hift.nsf_alpha",
    "noise_deviation": "hift.nsf_sigma",
    "voiced_threshold": "hift.nsf_voiced_threshold",
    "upsample": "hift.upsample_rates",
    "upsample_kernels": "hift.upsample_kernel_sizes",
    "n_fft": "hift.istft_params.n_fft",
    "hop": "hift.istft_params.hop_len",
    "resblock_kernels": "hift.resblock_kernel_sizes",
    "resblock_dilations": "hift.resblock_dilation_sizes",
    "source_kernels": "hift.source_resblock_kernel_sizes",
    "source_dilations": "hift.source_resblock_dilation_sizes",
    "slope": "hift.lrelu_slope",
    "limit": "hift.audio_limit",
    "f0_channels": "hift.f0_predictor.cond_channels",
}


def plain_names(source: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a file under the names of `table`.

    `generator.`, of the training wrapper, is left out; weight norm is weight_g and weight_v.
    """
    renames = (
        (r"^generator\.", ""),
        (r"parametrizations\.weight\.original0$", "weight_g"),
        (r"parametrizations\.weight\.original1$", "weight_v"),
    )

    def plain(name: str) -> str:
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        return name

    return {plain(name): value for name, value in source.items()}


def norm(weight: np.ndarray) -> np.ndarray:
    """The norm of a weight [A, B, K] over all axes but the first, [A, 1, 1]."""
    # Flattening first copies to C order, whatever the layout: equal weights are summed in the same
    # order and have bit-equal norms.
    rows = weight.reshape(-1).reshape(weight.shape[0], -1)
    return ((rows * rows).sum(1) ** 0.5).reshape(-1, 1, 1)


def weight_norm(axes: tuple[int, int, int]) -> Transform:
    """torch (weight_g, weight_v) <-> kernel, a torch weight transposed by `axes`."""
    inverse = tuple(int(axis) for axis in np.argsort(axes))

    def backward(y):
        weight = y.transpose(inverse)
        return norm(weight), weight

    return Transform(lambda g, v, shape: (v * (g / norm(v))).transpose(axes), backward)


conv_norm = weight_norm((2, 1, 0))  # Conv1d [out, in, K] <-> [K, in, out]
up_norm = weight_norm((0, 2, 1))  # ConvTranspose1d [in, out, K] <-> [in, K, out]


def normed(source: str, target: str, transform: Transform = conv_norm) -> Iterator[Rule]:
    """The rules of one weight-normed convolution."""
    yield Rule((f"{source}.weight_g", f"{source}.weight_v"), f"{target}.kernel", transform)
    yield Rule(f"{source}.bias", f"{target}.bias")


def plain(source: str, target: str, transform: Transform) -> Iterator[Rule]:
    """The rules of one layer without weight norm."""
    yield Rule(f"{source}.weight", f"{target}.kernel", transform)
    yield Rule(f"{source}.bias", f"{target}.bias")


def block(source: str, target: str, units: int) -> Iterator[Rule]:
    """The rules of one residual block."""
    for i in range(units):
        for side in (1, 2):
            yield from normed(f"{source}.convs{side}.{i}", f"{target}.units.{i}.conv{side}")
            yield Rule(
                f"{source}.activations{side}.{i}.alpha", f"{target}.units.{i}.snake{side}.alpha"
            )


def rules(config: HiftConfig) -> Iterator[Rule]:
    """The rules of the whole vocoder."""
    for i in range(F0Predictor.layers):
        # Activations have the odd numbers.
        yield from normed(f"f0_predictor.condnet.{2 * i}", f"f0.convs.{i}")
    yield from plain("f0_predictor.classifier", "f0.head", kernel())
    yield from plain("m_source.l_linear", "harmonic_mix", kernel())
    yield from normed("conv_pre", "conv_in")
    for i in range(len(config.upsample)):
        stage, count = f"stages.{i}", len(config.resblock_kernels)
        yield from normed(f"ups.{i}", f"{stage}.up", up_norm)
        yield from plain(f"source_downs.{i}", f"{stage}.source_down", conv)
        yield from block(
            f"source_resblocks.{i}", f"{stage}.source_block", len(config.source_dilations[i])
        )
        for j in range(count):
            yield from block(
                f"resblocks.{count * i + j}",
                f"{stage}.blocks.{j}",
                len(config.resblock_dilations[j]),
            )
    yield from normed("conv_post", "conv_out")


def table(config: HiftConfig) -> Table:
    """The table of a vocoder with these dimensions; its names are those of `plain_names`."""
    return Table(tuple(rules(config)))

"""HiFT vocoder: mel frames to 24 kHz samples by a harmonic source and an inverse STFT.

Port of CosyVoice2's HiFTGenerator (HiFTNet, arXiv 2309.09493). Rows are left-aligned and may be
padded: the input of every convolution is zero past a row's end, so padding and other rows do not
change its samples.
B batch, F mel frames, T steps or samples, M mel bins, H harmonics (the fundamental first),
C channels.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.config import HiftConfig
from omni2_jax.models.layers import Array, Conv1d, Linear, constant, inside, param

# Of initial values. Residual units add up before an exponential and a minimum, which pass no
# gradient when they saturate, and F0 is in Hz: training starts from small residuals, a quiet
# spectrum, and a fundamental near that of a voice.
RESIDUAL_SCALE, SPECTRUM_SCALE, LOG_MAGNITUDE = 0.2, 0.1, -3.0
F0_SCALE, F0_BIAS = 50.0, 100.0  # Hz


def trim(x: Array, lengths: Array) -> Array:
    """x [B, T, ...] with zeros from step `lengths` [B] of each row on."""
    mask = inside(lengths, x.shape[1])
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)


def overlap_add(pieces: Array, hop: int) -> Array:
    """Sum pieces [B, T, K, C] that start `hop` steps apart.

    Returns [B, (T - 1 + ceil(K / hop)) * hop, C], with zeros after the last piece.
    """
    batch, count, size, channels = pieces.shape
    spans = -(-size // hop)
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, spans * hop - size), (0, 0))).reshape(
        batch, count, spans, hop, channels
    )
    shifted = (
        jnp.pad(pieces[:, :, i], ((0, 0), (i, spans - 1 - i), (0, 0), (0, 0))) for i in range(spans)
    )
    return functools.reduce(jnp.add, shifted).reshape(batch, -1, channels)


def stft(x: Array, lengths: Array, n_fft: int, hop: int) -> Array:
    """Samples [B, T] of `lengths` [B] -> spectra [B, T / hop + 1, n_fft + 2], zero-padded.

    A spectrum is its real parts, then its imaginary parts. A row is reflected about its own first
    and last sample (torch.stft, centred, Hann window).
    """
    position = jnp.abs(jnp.arange(-n_fft // 2, x.shape[1] + n_fft // 2))
    last = lengths[:, None] - 1
    mirrored = jnp.clip(last - jnp.abs(last - position), 0, x.shape[1] - 1)
    blocks = jnp.take_along_axis(x, mirrored, axis=1).reshape(x.shape[0], -1, hop)
    spans, count = n_fft // hop, x.shape[1] // hop + 1
    frames = jnp.concatenate([blocks[:, i : i + count] for i in range(spans)], axis=-1)
    return trim(frames @ analysis(n_fft).astype(x.dtype), lengths // hop + 1)


def istft(spectra: Array, lengths: Array, hop: int) -> Array:
    """The inverse of `stft`: spectra [B, T / hop + 1, n_fft + 2] -> samples [B, T], zero-padded.

    lengths [B]: samples of each row.
    """
    n_fft, samples = spectra.shape[-1] - 2, (spectra.shape[1] - 1) * hop
    frames = lengths // hop + 1
    pieces = trim(spectra, frames) @ synthesis(n_fft).astype(spectra.dtype)
    weights = trim(
        jnp.broadcast_to(jnp.square(hann(n_fft)).astype(spectra.dtype), pieces.shape), frames
    )
    total, envelope = (
        overlap_add(x[..., None], hop)[:, n_fft // 2 : n_fft // 2 + samples, 0]
        for x in (pieces, weights)
    )
    return trim(total / jnp.where(envelope > 0, envelope, 1), lengths)


def hann(size: int) -> np.ndarray:
    """Periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def analysis(n_fft: int) -> np.ndarray:
    """Window and real DFT of a frame as one matrix [n_fft, n_fft + 2]."""
    spectrum = np.fft.rfft(np.diag(hann(n_fft)))
    return np.concatenate([spectrum.real, spectrum.imag], axis=1)


def synthesis(n_fft: int) -> np.ndarray:
    """Inverse real DFT and window as one matrix [n_fft + 2, n_fft]."""
    basis = np.eye(n_fft // 2 + 1)
    return np.concatenate([np.fft.irfft(basis), np.fft.irfft(1j * basis)]) * hann(n_fft)


# sin(pi r)^2 / r^2 as a polynomial in r^2 for |r| <= 1/2, highest power first; error below 1e-9
SINE_SQUARED = np.polynomial.Chebyshev.interpolate(
    lambda u: (np.pi * np.sinc(np.sqrt(u))) ** 2, 6, domain=[0, 0.25]
)
SINE_SQUARED = SINE_SQUARED.convert(kind=np.polynomial.Polynomial).coef[::-1]


def sine_squared(x: Array) -> Array:
    """sin(x)^2. With jnp.sin it would take a quarter of the vocoder's time on a CPU."""
    turns = x / jnp.pi
    square = jnp.square(turns - jnp.round(turns))
    return square * jnp.polyval(jnp.asarray(SINE_SQUARED, x.dtype), square)


class Snake(nnx.Module):
    """x + sin(alpha x)^2 / alpha, one alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int):
        self.alpha = constant((channels,), (None,), 1.0)

    def __call__(self, x: Array) -> Array:
        alpha = self.alpha[...].astype(x.dtype)
        return x + sine_squared(alpha * x) / (alpha + 1e-9)


class ResidualUnit(nnx.Module):
    """Two activated convolutions around a residual connection, the first one dilated."""

    def __init__(self, channels: int, kernel: int, dilation: int, rngs: nnx.Rngs):
        shape, reach = (kernel, channels, channels), (kernel - 1) // 2
        self.snake1, self.snake2 = Snake(channels), Snake(channels)
        self.conv1 = Conv1d(
            rngs, shape, dilation=dilation, padding=(reach * dilation, reach * dilation)
        )
        self.conv2 = Conv1d(rngs, shape, padding=(reach, reach), scale=RESIDUAL_SCALE)

    def __call__(self, x: Array, lengths: Array) -> Array:
        """x [B, T, C] of `lengths` [B] steps -> [B, T, C]."""
        y = self.conv1(trim(self.snake1(x), lengths))
        return x + self.conv2(trim(self.snake2(y), lengths))


class ResidualBlock(nnx.Module):
    """Residual units of growing dilation (HiFi-GAN's ResBlock1 with Snake)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], rngs: nnx.Rngs):
        self.units = nnx.List(
            [ResidualUnit(channels, kernel, dilation, rngs) for dilation in dilations]
        )

    def __call__(self, x: Array, lengths: Array) -> Array:
        """x [B, T, C] of `lengths` [B] steps -> [B, T, C]."""
        for unit in self.units:
            x = unit(x, lengths)
        return x


class Upsample(nnx.Module):
    """Transposed convolution, [B, T, C_in] -> [B, T * rate, C_out].

    Each step gives K output steps, which are overlap-added.
    """

    def __init__(self, shape: tuple[int, int, int], rate: int, rngs: nnx.Rngs):
        self.rate = rate
        self.kernel = param(
            rngs, shape, (None, None, None), fan_in=shape[0] * shape[1] // rate
        )  # [C_in, K, C_out]
        self.bias = param(rngs, shape[2:], (None,))

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        margin = (kernel.shape[1] - self.rate) // 2
        y = overlap_add(jnp.tensordot(x, kernel, 1), self.rate)
        return y[:, margin : margin + x.shape[1] * self.rate] + self.bias[...].astype(x.dtype)


class Stage(nnx.Module):
    """Upsample, add the source's spectrum at this rate, and average several residual blocks."""

    def __init__(self, config: HiftConfig, index: int, rngs: nnx.Rngs):
        channels = config.channels // 2 ** (index + 1)
        self.slope, self.rate = config.slope, config.upsample[index]
        self.last = index == len(config.upsample) - 1
        self.up = Upsample(
            (2 * channels, config.upsample_kernels[index], channels), self.rate, rngs
        )
        stride = math.prod(config.upsample[index + 1 :])
        kernel = 1 if self.last else 2 * stride
        self.source_down = Conv1d(
            rngs,
            (kernel, config.n_fft + 2, channels),
            stride=stride,
            padding=(stride // 2, stride // 2),
        )
        self.source_block = ResidualBlock(
            channels, config.source_kernels[index], config.source_dilations[index], rngs
        )
        blocks = zip(config.resblock_kernels, config.resblock_dilations, strict=True)
        self.blocks = nnx.List(
            [ResidualBlock(channels, kernel, dilations, rngs) for kernel, dilations in blocks]
        )

    def __call__(self, x: Array, lengths: Array, spectra: Array) -> tuple[Array, Array]:
        """x [B, T, 2C], lengths [B] and the source's spectra -> (x [B, T * rate, C], lengths [B]).

        spectra [B, S + 1, n_fft + 2], where S is the number of steps that the last stage upsamples
        to. The last stage returns S + 1 steps, one more than T * rate.
        """
        x = self.up(trim(jax.nn.leaky_relu(x, self.slope), lengths))
        lengths = lengths * self.rate
        if self.last:  # one step more, as an STFT of n hops has n + 1 frames
            x, lengths = jnp.concatenate([x[:, 1:2], x], axis=1), lengths + 1
        x = x + self.source_block(self.source_down(spectra), lengths)
        y = functools.reduce(jnp.add, [block(x, lengths) for block in self.blocks])
        return y / len(self.blocks), lengths


class F0Predictor(nnx.Module):
    """Fundamental frequency of each mel frame: convolutions with ELU, then a linear head.

    Reference: CosyVoice's ConvRNNF0Predictor.
    """

    layers = 5

    def __init__(self, config: HiftConfig, rngs: nnx.Rngs):
        widths = (config.mels,) + (config.f0_channels,) * self.layers
        self.convs = nnx.List(
            [Conv1d(rngs, (3, *pair), padding=(1, 1)) for pair in itertools.pairwise(widths)]
        )
        self.head = Linear(rngs, (config.f0_channels, 1), (None, None), scale=F0_SCALE)
        self.head.bias = constant((1,), (None,), F0_BIAS)

    @jax.default_matmul_precision("highest")
    def __call__(self, mel: Array, frames: Array) -> Array:
        """mel [B, F, M] of `frames` [B] frames -> Hz, [B, F].

        In true float32 on every device: GPUs multiply float32 numbers in TF32 and TPUs in bfloat16
        unless told otherwise, and the source adds the errors of all frames up.
        """
        x = mel
        for conv in self.convs:
            x = jax.nn.elu(conv(trim(x, frames)))
        # A sum, not a product with a matrix of one column: on a CPU the rounding of that depends on
        # a frame's place in the batch.
        column = self.head.kernel[...][:, 0].astype(x.dtype)
        assert self.head.bias is not None
        return jnp.abs(jnp.sum(x * column, -1) + self.head.bias[...].astype(x.dtype))


class Hift(nnx.Module):
    """The network. `__call__` runs whole utterances; hift_streaming.py runs them in parts."""

    def __init__(self, config: HiftConfig, rngs: nnx.Rngs):
        self.config = config
        self.f0 = F0Predictor(config, rngs)
        self.harmonic_mix = Linear(rngs, (config.harmonics + 1, 1), (None, None))
        self.conv_in = Conv1d(rngs, (7, config.mels, config.channels), padding=(3, 3))
        self.stages = nnx.List([Stage(config, i, rngs) for i in range(len(config.upsample))])
        last = config.channels // 2 ** len(config.upsample)
        bins = config.n_fft // 2 + 1
        shape, biases = (7, last, 2 * bins), (LOG_MAGNITUDE,) * bins + (0.0,) * bins
        self.conv_out = Conv1d(rngs, shape, padding=(3, 3), scale=SPECTRUM_SCALE)
        self.conv_out.bias = constant((2 * bins,), (None,), biases)

    def __call__(self, mel: Array, frames: Array, phase: Array, noise: Array) -> Array:
        """The samples [B, F * samples_per_frame] of whole utterances, in one pass.

        mel [B, F, M], of which the first `frames` [B] count; phase and noise: see `draw`.
        """
        return self.decode(mel, frames, self.source(self.f0(mel, frames), phase, noise))

    def cycles(self, f0: Array) -> Array:
        """Cycles, modulo 1, of the fundamental f0 [B, F] in Hz up to the end of each frame, [B, F].

        Whole cycles are dropped before rounding. A running sum over samples in float32 would change
        the source by 0.06 after 2.4 s.
        """
        frame_rate = self.config.sample_rate / self.config.samples_per_frame
        return jax.lax.associative_scan(
            lambda a, b: (a + b) % 1, f0 % frame_rate / frame_rate, axis=1
        )

    @jax.default_matmul_precision("highest")
    def source(self, f0: Array, phase: Array, noise: Array) -> Array:
        """f0 [B, F] in Hz -> excitation [B, T], T = F * samples_per_frame.

        phase [B, H] in radians: of each harmonic at the start; noise [B, T, H]: N(0, 1). f0 is
        constant within a frame. References: SineGen and SourceModuleHnNSF.
        """
        config, rate = self.config, self.config.samples_per_frame
        starts = jnp.pad(self.cycles(f0)[:, :-1], ((0, 0), (1, 0)))
        seconds = jnp.arange(1, rate + 1, dtype=f0.dtype) / config.sample_rate
        cycles = (starts[..., None] + f0[..., None] * seconds).reshape(f0.shape[0], -1, 1) % 1
        angles = 2 * jnp.pi * (cycles * jnp.arange(1, config.harmonics + 2) % 1)  # [B, T, H]
        voiced = jnp.repeat(f0 > config.voiced_threshold, rate, axis=1)[..., None]
        sines = jnp.where(voiced, config.sine_amplitude * jnp.sin(angles + phase[:, None]), 0)
        noise = noise * jnp.where(voiced, config.noise_deviation, config.sine_amplitude / 3)
        return jnp.tanh(self.harmonic_mix(sines + noise)[..., 0])

    def decode(self, mel: Array, frames: Array, source: Array) -> Array:
        """mel [B, F, M] of `frames` [B] frames and source [B, T] -> samples [B, T].

        T = F * samples_per_frame. Reference: HiFTGenerator.decode.
        """
        config = self.config
        samples = frames * config.samples_per_frame
        spectra = stft(source, samples, config.n_fft, config.hop)
        x, lengths = self.conv_in(trim(mel, frames)), frames
        for stage in self.stages:
            x, lengths = stage(x, lengths, spectra)
        x = self.conv_out(trim(jax.nn.leaky_relu(x, 0.01), lengths))
        magnitude, phase = jnp.split(x, 2, axis=-1)
        magnitude, phase = jnp.minimum(jnp.exp(magnitude), 1e2), jnp.sin(phase)
        spectra = jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], axis=-1)
        return jnp.clip(istft(spectra, samples, config.hop), -config.limit, config.limit)


def draw(config: HiftConfig, keys: Array, samples: int) -> tuple[Array, Array]:
    """The source's random numbers, one key a row: phases [B, H] and N(0, 1) noise [B, samples, H].

    The fundamental's phase is 0, and so are the others' if the config's random_phases are off. A
    row depends on its own key only, and the noise of fewer samples is a prefix of that of more.
    """

    def row(key):
        phase_key, noise_key = jax.random.split(key)
        spread = jnp.pi if config.random_phases else 0.0
        phase = (
            jax.random.uniform(phase_key, (config.harmonics + 1,), minval=-spread, maxval=spread)
            .at[0]
            .set(0)
        )
        return phase, jax.random.normal(noise_key, (samples, config.harmonics + 1))

    return jax.vmap(row)(keys)

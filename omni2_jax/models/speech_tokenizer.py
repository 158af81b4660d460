"""S3 speech tokenizer v2: 16 kHz speech -> 25 units a second, the training data of the speech LM.

The first layers of SenseVoice's encoder (Whisper's blocks with rotary positions and an FSMN memory)
and a finite scalar quantization (CosyVoice 2, arXiv 2412.10117, section 2.2; s3tokenizer's
model_v2). B batch, T frames or units, M mel bins, D width, N heads, H head size.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.audio import features
from omni2_jax.checkpoint import parameters
from omni2_jax.config import SpeechTokenizerConfig
from omni2_jax.files import atomic_write
from omni2_jax.models import speech_encoder
from omni2_jax.models.decoder import rope
from omni2_jax.models.layers import Conv1d, DepthwiseConv1d, Linear, attention, inside
from omni2_jax.models.speech_encoder import gelu
from omni2_jax.models.stacks import scan, stack
from omni2_jax.validation import validated

Array = jax.Array

LEVELS = 3  # values of a digit
STRIDE = 4  # mel frames per unit
LIMIT = 0.999  # keeps a saturated tanh inside the outer levels
# Of initial values. A residual path of full size, and digits that begin near the limits of tanh,
# would let most of the units die in the first hundred steps of training.
RESIDUAL_SCALE, DIGIT_SCALE = 0.3, 0.5
FILE = "speech_tokenizer.json"  # holds a SpeechTokenizerConfig, beside a checkpoint's config.json
RENAMED = {"memory": "is called fsmn_taps now; rename it"}  # former names of settings in FILE


class Block(speech_encoder.Block):
    """Whisper's block with an FSMN memory: a depthwise convolution over the attention's values."""

    def __init__(self, config: SpeechTokenizerConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs, RESIDUAL_SCALE)
        taps, width = config.fsmn_taps, config.width
        self.theta = config.rope_theta
        self.memory = DepthwiseConv1d(
            rngs,
            (taps, 1, width),
            padding=((taps - 1) // 2, taps // 2),
            groups=width,
            bias=False,
            scale=RESIDUAL_SCALE,
        )

    def fsmn(self, value: Array, valid: Array) -> Array:
        """Values [B, T, N, H] -> [B, T, D]; zeros where `valid` [B, T, 1] is False."""
        x = value.reshape(*value.shape[:2], -1) * valid
        return x + self.memory(x)

    def __call__(self, x: Array, valid: Array) -> Array:
        """x [B, T, D], valid bool [B, T, 1] (inside the row) -> [B, T, D]."""
        y = self.attention_norm(x)
        positions = jnp.arange(x.shape[1])[None]
        query = rope(self.query(y), positions, self.theta)
        key, value = rope(self.key(y), positions, self.theta), self.value(y)
        attended = attention(query, key, value, mask=valid[:, None, None, :, 0])
        x = x + self.out(attended) + self.fsmn(value, valid)
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class SpeechTokenizer(nnx.Module):
    """Two convolutions of stride 2, blocks, and the quantizer; units are in [0, 3 ** digits).

    `tokenize` runs it on samples; calling it on log-mel is the network alone.
    """

    def __init__(self, config: SpeechTokenizerConfig, rngs: nnx.Rngs):
        self.config = config
        d, axes = config.width, (None, None, "embed")
        self.conv1 = Conv1d(rngs, (3, config.mels, d), stride=2, padding=(1, 1), axes=axes)
        self.conv2 = Conv1d(rngs, (3, d, d), stride=2, padding=(1, 1), axes=axes)
        self.blocks = stack(config.layers, lambda r: Block(config, r), rngs)
        shape = (config.width, config.digits)
        self.project = Linear(rngs, shape, ("embed", None), scale=DIGIT_SCALE)

    def encode(self, mel: Array, lengths: Array) -> Array:
        """Log-mel [B, T, M] and lengths [B] in frames -> hidden states [B, ceil(T / 4), D]."""
        x = gelu(self.conv1(mel * inside(lengths, mel.shape[1])[..., None]))
        x = gelu(self.conv2(x * inside(halved(lengths), x.shape[1])[..., None]))
        valid = inside(units_of(lengths), x.shape[1])[..., None]
        return scan(self.blocks, lambda block, x, _: (block(x, valid), None), x)[0]

    def quantize(self, hidden: Array) -> Array:
        """Hidden states [B, T, D] -> units [B, T] int32; the first channel is the least digit."""
        return units_of_digits(bounded(self.project(hidden)))

    def __call__(self, mel: Array, lengths: Array) -> tuple[Array, Array]:
        """Log-mel [B, T, M] and lengths [B] in frames -> units [B, ceil(T / 4)] int32, lengths [B].

        Units beyond their length are 0. More than `window` frames are read in overlapping windows.
        """
        read = self.read if mel.shape[1] <= self.config.window else self.read_windows
        units, counts = read(mel, lengths), units_of(lengths)
        return jnp.where(inside(counts, units.shape[1]), units, 0), counts

    def read(self, mel: Array, lengths: Array) -> Array:
        """Units [B, ceil(T / 4)] of log-mel [B, T, M] in one pass; undefined beyond the end."""
        return self.quantize(self.encode(mel, lengths))

    def read_windows(self, mel: Array, lengths: Array) -> Array:
        """The same in windows that overlap, up to the window that reaches a row's end.

        Every unit comes from the window in which it is farther from an inner edge. s3tokenizer
        0.3.0 does so too, but if its last window would hold less than `overlap` frames, it loses up
        to half an `overlap` of units.
        """
        size, overlap = self.config.window, self.config.overlap
        step = size - overlap
        padded = jnp.pad(mel, ((0, 0), (0, size), (0, 0)))

        def read_from(start: Array) -> Array:
            window = jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)
            return self.read(window, jnp.clip(lengths - start, 0, size))

        starts = jnp.arange(0, mel.shape[1] - overlap, step)
        units = jax.lax.map(read_from, starts)  # [windows, B, size / 4]
        position = jnp.arange(units_of(mel.shape[1]))[None]
        # The window that reaches the end of each row.
        last = jnp.maximum(lengths - overlap - 1, 0)[:, None] // step
        window = jnp.clip((position - overlap // 2 // STRIDE) // (step // STRIDE), 0, last)
        rows = jnp.arange(len(lengths))[:, None]
        return units[window, rows, position - window * (step // STRIDE)]


def bounded(x: Array) -> Array:
    """Projected hidden states -> float32 between the outer levels, -1 and 1."""
    return LIMIT * jnp.tanh(x.astype(jnp.float32))


def straight_through(x: Array) -> Array:
    """Projected hidden states -> digits -1, 0 or 1 in float32, with the gradient of `bounded`.

    The rounding has no gradient of its own (Bengio et al., arXiv 1308.3432; FSQ, arXiv 2309.15505).
    """
    y = bounded(x)
    return y + jax.lax.stop_gradient(jnp.round(y) - y)


def units_of_digits(digits: Array) -> Array:
    """Digits [..., K] from -1 to 1, which are rounded here -> units [...] int32."""
    digits = jnp.round(digits).astype(jnp.int32) + LEVELS // 2
    return digits @ LEVELS ** jnp.arange(digits.shape[-1])


def halved(length: Any) -> Any:
    """Frames after a convolution of stride 2, for a number of frames or an array of them."""
    return (length + 1) // 2


def units_of(frames: Any) -> Any:
    """Units of a number of mel frames, or of an array of them."""
    return halved(halved(frames))


def tokenize(
    tokenizer: SpeechTokenizer, wav: Array, lengths: Array | None = None
) -> tuple[Array, Array]:
    """Units [B, T] int32 and their lengths [B], of recordings [B, N] at 16 kHz in [-1, 1].

    Units beyond their length are 0. lengths: [B] in samples, if they differ. Raises ValueError
    if N is under 160 samples (10 ms).
    """
    if wav.shape[1] < features.WHISPER_HOP:
        raise ValueError(
            f"a recording of {wav.shape[1]} samples is too short;"
            f" at least {features.WHISPER_HOP} (10 ms) are needed"
        )
    lengths = jnp.full(wav.shape[:1], wav.shape[1]) if lengths is None else lengths
    return _tokenize(*nnx.split(tokenizer), wav, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _tokenize(
    graph: nnx.GraphDef, params: nnx.State, wav: Array, lengths: Array
) -> tuple[Array, Array]:
    tokenizer = nnx.merge(graph, params)
    # A unit is a rounded number: with TF32 or bfloat16 passes some units would change.
    with jax.default_matmul_precision("highest"):
        mel = features.log_mel(wav, lengths, tokenizer.config.mels)
        return tokenizer(mel, lengths // features.WHISPER_HOP)


# ---- in a checkpoint: FILE, and parameters in params/speech_tokenizer ----


def abstract(config: SpeechTokenizerConfig) -> tuple[nnx.GraphDef, dict]:
    """The tokenizer's graph, and its parameters as a nested dict of ShapeDtypeStruct."""
    graph, state = nnx.split(nnx.eval_shape(lambda: SpeechTokenizer(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def save_config(directory: Path, config: SpeechTokenizerConfig) -> None:
    """Write the configuration to FILE of a checkpoint, whole or not at all."""
    with atomic_write(directory / FILE) as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def load_config(directory: Path) -> SpeechTokenizerConfig:
    """The configuration in FILE of a checkpoint.

    Raises ValueError naming the checkpoint if it has no speech tokenizer or FILE is damaged.
    """
    path = directory / FILE
    try:
        content = path.read_bytes()
    except OSError:
        add = f"omni2 convert --speech-tokenizer FILE --out {directory}"
        raise ValueError(
            f"{directory} has no speech tokenizer (no {FILE}); add one with {add}"
        ) from None
    context = f"{path} is not a speech tokenizer's configuration"
    return validated(SpeechTokenizerConfig, content, context, RENAMED)


def load(directory: Path) -> SpeechTokenizer:
    """The speech tokenizer of a checkpoint, in float32.

    Raises ValueError if the checkpoint has none, or if its files are damaged.
    """
    graph, shapes = abstract(load_config(directory))
    return nnx.merge(
        graph, parameters.load_part(directory, "speech_tokenizer", shapes, jnp.float32)
    )


def fingerprint(tokenizer: SpeechTokenizer) -> str:
    """A hash of the parameters, 16 hexadecimal digits.

    A data set states it, and `omni2 prepare` does not go on with the work of another tokenizer.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(parameters.flatten(nnx.to_pure_dict(nnx.state(tokenizer))).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]

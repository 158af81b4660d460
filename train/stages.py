"""What each stage of the paper trains, and on which loss. B batch, C clips, T LLM positions, S tokens of the speech LM, D width.

1a    speech -> text        adapter and LLM                   cross-entropy of the assistant's text
1b    text -> speech        speech LM, text embeddings only   cross-entropy of units in the read/write layout
2     speech -> speech      gate fusion and speech LM         the same, on the LLM's hidden states
flow  units -> mel          flow matching                     conditional flow matching, for a voice of one's own
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from omni2_jax.audio import features, recordings
from omni2_jax.models import speaker
from omni2_jax.models.flow.mask import Chunks
from omni2_jax.models.model import Model
from omni2_jax.sharding import constrain
from omni2_jax.train.examples import UNITS_PER_SECOND
from omni2_jax.train.losses import token_loss
from omni2_jax.train.settings import TrainConfig

Array = jax.Array
Loss = tuple[Array, Array]  # sum, and over how many


@dataclass(frozen=True)
class Stage:
    """Parts to load, and those of them that are trained."""

    parts: tuple[str, ...]
    trained: tuple[str, ...]


STAGES = {
    "1a": Stage(("speech_encoder", "adapter", "llm"), ("adapter", "llm")),
    "1b": Stage(("speech_lm",), ("speech_lm",)),
    "2": Stage(
        ("speech_encoder", "adapter", "llm", "fusion", "speech_lm"), ("fusion", "speech_lm")
    ),
    "flow": Stage(("flow", "speaker"), ("flow",)),
}


def parts(train: TrainConfig) -> tuple[str, ...]:
    """The parts whose weights are needed: where the LLM's hidden states are on disk, neither it nor what is before it."""
    return tuple(
        part
        for part in STAGES[train.stage].parts
        if not train.hidden or part in STAGES[train.stage].trained
    )


def is_trained(train: TrainConfig, path: str) -> bool:
    """Whether a parameter is, by its path ("llm.layers.mlp.up.kernel")."""
    part, *_, name = path.split(".")
    if (
        part not in STAGES[train.stage].trained or path == "flow.noise"
    ):  # the noise is a constant that lives with the weights
        return False
    return name in ("low", "high") if train.rank and part == "llm" else True


def loss(model: Model, train: TrainConfig, batch: dict[str, Array], key: Array) -> Loss:
    """Of one microbatch [B, ...]: the sum, and how many terms it has."""
    compute = {"1a": text_loss, "1b": unit_loss, "2": speech_loss, "flow": flow_loss}[train.stage]
    return compute(model, train, batch, key)


def positions(ids: Array) -> Array:
    """Of right-padded rows: 0, 1, 2 ... and -1 where there is nothing (an id of -1)."""
    return jnp.where(ids == -1, -1, jnp.arange(ids.shape[-1]))


def hear(model: Model, train: TrainConfig, batch: dict[str, Array]) -> Array:
    """Recordings [B, C, N] int16 -> what the frozen speech encoder makes of them, [B * C, T, E]."""
    rows, clips, samples = batch["audio"].shape
    wav = constrain(
        recordings.from_int16(batch["audio"].reshape(rows * clips, samples)), "batch", None
    )
    return jax.lax.stop_gradient(model.speech_encoder(features.log_mel(wav).astype(train.dtype)))


def read_dialogue(model: Model, train: TrainConfig, batch: dict[str, Array]) -> Array:
    """The LLM's hidden states [B, T, D] of whole dialogues: recordings [B, C, N] int16, ids [B, T]."""
    speech = model.adapter(hear(model, train, batch))
    x = model.embed_prompt(batch["ids"], speech.reshape(len(batch["ids"]), -1, speech.shape[-1]))
    return model.llm(constrain(x, "batch", None, None), positions(batch["ids"]), remat=train.remat)[
        0
    ]


def text_loss(model: Model, train: TrainConfig, batch: dict[str, Array], key: Array) -> Loss:
    return token_loss(
        read_dialogue(model, train, batch), batch["targets"], model.llm.logits, train.loss_block
    )


def unit_loss(model: Model, train: TrainConfig, batch: dict[str, Array], key: Array) -> Loss:
    x = model.speech_lm.embed(batch["tokens"]).astype(train.dtype)
    return speak(model, train, x, batch["tokens"], batch["targets"])


def speech_loss(model: Model, train: TrainConfig, batch: dict[str, Array], key: Array) -> Loss:
    hidden = (
        batch["hidden"].astype(train.dtype)
        if train.hidden
        else jax.lax.stop_gradient(read_dialogue(model, train, batch))
    )
    return reply_loss(model, train, hidden, batch)


def reply_loss(model: Model, train: TrainConfig, hidden: Array, batch: dict[str, Array]) -> Loss:
    """Replies [B, C, S] given hidden states [B, T, D]: `source` is the position whose state produced a text token, -1 for other rows."""
    at = jnp.maximum(batch["source"], 0)
    produced = jnp.take_along_axis(hidden[:, None], at[..., None], axis=2)  # [B, C, S, D]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    tokens, source = flat(batch["tokens"]), flat(batch["source"])
    embedded = model.speech_lm.embed(tokens).astype(hidden.dtype)
    fused = model.fuse(flat(produced), jnp.maximum(tokens, 0))
    x = jnp.where((source >= 0)[..., None], fused, embedded)
    return speak(model, train, x, tokens, flat(batch["targets"]))


def speak(model: Model, train: TrainConfig, x: Array, tokens: Array, targets: Array) -> Loss:
    x = constrain(x, "batch", None, None)
    hidden, _ = model.speech_lm(x, positions(tokens), remat=train.remat)
    return token_loss(hidden, targets, model.speech_lm.logits, train.loss_block)


def listen(model: Model, train: TrainConfig, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Replies of U units -> mel [B, T, M] of their recordings at 24 kHz, and x-vectors [B, E] of the same at 16 kHz."""
    lengths = jnp.sum(batch["units"] != -1, 1)
    speech, heard = (recordings.from_int16(batch[name]) for name in ("speech", "heard"))
    mel = features.mel24k(
        speech, lengths * (recordings.OUTPUT_RATE // UNITS_PER_SECOND), model.flow.config.mels
    )
    # (A row without a recording is measured as silence: its voice has to be a number.)
    x_vector = speaker.embed(
        model.speaker, heard, jnp.maximum(lengths, 2) * (recordings.INPUT_RATE // UNITS_PER_SECOND)
    )
    return mel, jax.lax.stop_gradient(x_vector)


def flow_loss(model: Model, train: TrainConfig, batch: dict[str, Array], key: Array) -> Loss:
    """Units [B, U] and their recordings. Reference: CausalMaskedDiffWithXvec.forward.

    Drawn for every row: time, noise, whether it keeps its conditions, and how much of its start it is given; for all together a
    chunk size.
    """
    flow, units = model.flow, batch["units"]
    config, rate, rows = flow.config, flow.config.upsample, units.shape[0]
    lengths = jnp.sum(units != -1, 1)
    mel, x_vector = listen(model, train, batch)
    t, noise, keep, begin, share, chunk = jax.random.split(key, 6)
    given = (
        jax.random.uniform(share, (rows,), maxval=0.3)
        * jax.random.bernoulli(begin, 0.5, (rows,))
        * rate
        * lengths
    )
    frame = jnp.arange(mel.shape[1])
    cond = jnp.where(frame[None, :, None] < given[:, None, None], mel, 0)
    sizes = jnp.array([size or units.shape[1] for size in train.chunks] or [config.chunk])
    chunks = Chunks(sizes[jax.random.randint(chunk, (), 0, len(sizes))])
    mu = flow.mu(jnp.maximum(units, 0), lengths, chunks)
    return flow.compute_loss(
        mel,
        rate * lengths,
        mu,
        flow.voice(x_vector),
        cond,
        jax.random.uniform(t, (rows,)),
        jax.random.normal(noise, mel.shape),
        jax.random.bernoulli(keep, 1 - config.guidance_dropout, (rows,)),
        chunks,
    )

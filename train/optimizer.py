"""AdamW with gradient clipping, a linear warm-up and a cosine decay of the learning rate."""

import jax
import optax

from omni2_jax.train.settings import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a cosine (paper section 4.1)."""
    warmup = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.peak,
        config.peak,
        warmup,
        max(steps, warmup + 1),
        config.final * config.peak,
    )


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps, for parameters by path."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def decayed(params: optax.Params) -> optax.Params:
    """Whether weight decay applies, by parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), params)


def is_matrix(path: str) -> bool:
    """False for biases and for the scales of normalisations."""
    return path.rpartition(".")[2] not in ("bias", "scale")

"""What one step of stage "vocoder" does, by the phase it is in.

Three groups of parameters, each with an AdamW of its own: the F0 predictor, the rest of the
vocoder, and the discriminators. A group that is not trained in a phase stays as it is, its
optimizer too. The learning rates are part of the state, so that other rates need no other program.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.train import discriminators, harmonic_phases, spectral
from omni2_jax.train.optimizer import decayed
from omni2_jax.train.settings import OptimizerConfig
from omni2_jax.train.step import Metrics, Objective, Sums, optimizer_shardings
from omni2_jax.train.weights import Params, Weights

if TYPE_CHECKING:
    from omni2_jax.train.stages.vocoder import Pieces, VocoderStage

Array = jax.Array
Losses = dict[str, Array]  # by the names of their weights in the settings

GENERATOR = ("f0", "vocoder")  # the groups that are exported


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rates:
    """Learning rates from one step to another: a linear warm-up, then a cosine."""

    peak: Array
    final: Array
    first: Array  # step
    warmup: Array  # in steps
    last: Array  # step, after which the rate stays at `final`

    @classmethod
    def of(cls, config: OptimizerConfig, peak: float, first: int, last: int) -> "Rates":
        values = (peak, config.final * peak, first, config.warmup * (last - first), last)
        return cls(*(jnp.asarray(value, jnp.float32) for value in values))

    def at(self, step: Array) -> Array:
        """The learning rate of a step."""
        since = step - self.first
        rising = jnp.minimum(1, (since + 1) / jnp.maximum(self.warmup, 1))
        length = jnp.maximum(self.last - self.first - self.warmup, 1)
        share = jnp.clip((since - self.warmup) / length, 0, 1)
        falling = (1 + jnp.cos(jnp.pi * share)) / 2
        return rising * (self.final + (self.peak - self.final) * falling)


def rate_at(spans: tuple[Rates, ...], step: Array) -> Array:
    """The learning rate of a step: that of the last span that has begun."""
    rate = spans[0].at(step)
    for span in spans[1:]:
        rate = jnp.where(step < span.first, rate, span.at(step))
    return rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes, by group."""

    step: Array
    params: dict[str, Params]  # float32
    opt: dict[str, optax.OptState]
    rates: dict[str, tuple[Rates, ...]]
    ema: Params | None  # of the vocoder and its F0 predictor


@dataclass(frozen=True)
class Judged:
    """The discriminators' loss and gradients, and the vocoder's losses by its generated samples."""

    discriminator_loss: Array
    grads: Params
    losses: Losses  # not weighted
    to_samples: Array  # gradient of their weighted sum


class VocoderObjective(Objective):
    """The F0 predictor, then spectral losses, then discriminators too."""

    def __init__(self, stage: "VocoderStage", weights: Weights, steps: int):
        self.stage, self.train, self.weights, self.steps = stage, stage.train, weights, steps
        self.settings = stage.train.vocoder
        config = stage.train.optimizer
        adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
            learning_rate=0.0,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.decay,
            mask=decayed,
        )
        self.clip, self.optimizer = optax.clip_by_global_norm(config.clip), adamw
        self.vocoder_config = weights.config.vocoder

    # The state

    def initial(self, params: Params) -> State:
        groups = divide(params)
        config = self.train.optimizer
        rates = {name: self.spans(name) for name in groups}
        opt = {name: self.optimizer.init(group) for name, group in groups.items()}
        ema = None if config.ema is None else jax.tree.map(jnp.copy, exported(groups))
        return State(jnp.zeros((), jnp.int32), groups, opt, rates, ema)

    def spans(self, name: str) -> tuple[Rates, ...]:
        """The learning rates of a group."""
        config, settings = self.train.optimizer, self.settings
        begin = 0 if settings.gan_from is None else settings.gan_from
        if name == "discriminators":
            return (Rates.of(config, settings.discriminator_peak, begin, self.steps),)
        peak, first = {
            "f0": (settings.f0_peak, 0),
            "vocoder": (config.peak, settings.f0_steps),
        }[name]
        if settings.gan_from is None or settings.gan_peak is None:
            return (Rates.of(config, peak, first, self.steps),)
        alone = Rates.of(config, peak, first, begin)
        return alone, Rates.of(config, settings.gan_peak, begin, self.steps)

    def shardings(self, params: Params, mesh: Mesh) -> Any:
        replicated = sharding.replicated(mesh)
        groups = divide(params)
        places = {
            name: {path: self.weights.shardings[path] for path in group}
            for name, group in groups.items()
        }
        opt = {
            name: optimizer_shardings(self.optimizer, group, places[name], mesh)
            for name, group in groups.items()
        }
        rates = jax.tree.map(lambda _: replicated, {name: self.spans(name) for name in groups})
        ema = None if self.train.optimizer.ema is None else exported(places)
        return State(replicated, places, opt, rates, ema)  # pyright: ignore[reportArgumentType]

    def result(self, state: State) -> Params:
        return exported(state.params) if state.ema is None else state.ema

    # A step

    def phase(self, number: int) -> str:
        return self.stage.phase(number)

    def step(
        self, state: State, frozen: Params, batch: dict, phase: str = "spectral"
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(self.train.seed), state.step)
        piece_key, source_key = jax.random.split(key)
        microbatch = jax.tree.map(lambda value: value[0], batch)
        pieces = self.stage.pieces(self.vocoder_config.mels, microbatch, piece_key)
        params, opt, metrics = dict(state.params), dict(state.opt), {}

        def update(name: str, grads: Params) -> None:
            """Let a group take its step."""
            rate = rate_at(state.rates[name], state.step)
            params[name], opt[name], norm = self.update(params[name], opt[name], grads, rate)
            metrics[f"{name}_norm"] = norm
            metrics[f"{name}_rate"] = rate

        if phase == "f0":
            (metrics["loss"], grads) = jax.value_and_grad(self.f0_loss)(params["f0"], pieces)
            update("f0", grads)
        else:
            generator = {name: params[name] for name in GENERATOR}
            (samples, f0), pull_back = jax.vjp(
                lambda groups: self.generate(groups, pieces, source_key), generator
            )
            losses, to_samples, to_f0 = self.spectral_losses(samples, f0, pieces)
            if phase == "adversarial":
                judged = self.judge(params["discriminators"], pieces, samples)
                losses |= judged.losses
                to_samples += judged.to_samples
                metrics["discriminator_loss"] = judged.discriminator_loss
                update("discriminators", judged.grads)
            metrics |= {f"{name}_loss": loss for name, loss in losses.items()}
            metrics["loss"] = self.weighted(losses)
            (grads,) = pull_back((to_samples, to_f0))
            for name in GENERATOR:
                update(name, grads[name])
        return State(state.step + 1, params, opt, state.rates, self.average(state, params)), metrics

    def update(
        self, params: Params, opt: Any, grads: Params, rate: Array
    ) -> tuple[Params, Any, Array]:
        """A group after a step with these gradients -> (parameters, optimizer's state, norm)."""
        norm = optax.tree.norm(grads)
        clipped, _ = self.clip.update(grads, optax.EmptyState())
        opt = opt._replace(hyperparams=opt.hyperparams | {"learning_rate": rate})
        updates, opt = self.optimizer.update(clipped, opt, params)
        updated: Any = optax.apply_updates(params, updates)
        return updated, opt, norm

    def average(self, state: State, params: dict[str, Params]) -> Params | None:
        """The average of the weights after a step."""
        decay = self.train.optimizer.ema
        if decay is None or state.ema is None:
            return None
        return jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state.ema, exported(params)
        )

    # Losses

    def generate(
        self, groups: dict[str, Params], pieces: "Pieces", key: Array
    ) -> tuple[Array, Array]:
        """The vocoder's samples of some pieces, and its F0."""
        vocoder = self.weights.model(*groups.values()).vocoder
        return self.stage.generate(vocoder, pieces, key)

    def f0_loss(self, params: Params, pieces: "Pieces") -> Array:
        """The mean error of the F0 predictor, in Hz."""
        vocoder = self.weights.model(params).vocoder
        f0 = vocoder.f0(pieces.mel, jnp.full(len(pieces.mel), pieces.mel.shape[1]))
        return spectral.row_mean(jnp.abs(f0 - pieces.f0), pieces.rows)

    def weighted(self, losses: Losses) -> Array:
        """The sum of losses with their weights from the settings."""
        return sum(
            (getattr(self.settings, name) * loss for name, loss in losses.items()), jnp.zeros(())
        )

    def spectral_losses(
        self, samples: Array, f0: Array, pieces: "Pieces"
    ) -> tuple[Losses, Array, Array]:
        """Losses of generated samples and their F0 -> (losses, gradients to samples and to F0)."""
        recorded, rows = pieces.samples, pieces.rows
        voiced_f0 = jnp.where(f0 > self.vocoder_config.voiced_threshold, f0, 0)

        def loss(samples: Array, f0: Array) -> tuple[Array, Losses]:
            losses = {
                "mel": spectral.mel_loss(samples, recorded, rows),
                "stft": spectral.stft_loss(samples, recorded, rows),
                "f0": spectral.row_mean(jnp.abs(f0 - pieces.f0), rows),
            }
            if self.settings.harmonic_phases:
                losses["harmonic_phases"] = harmonic_phases.loss(
                    samples, recorded, voiced_f0, pieces.f0, rows
                )
            return self.weighted(losses), losses

        (_, losses), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(samples, f0)
        return losses, *grads

    def judge(self, params: Params, pieces: "Pieces", samples: Array) -> "Judged":
        """What the discriminators make of generated samples, for them and for the vocoder.

        Both learn from the same scores, so that each network runs once on each signal.
        """
        rows, settings = pieces.rows, self.settings

        def maps(params: Params, samples: Array) -> discriminators.Maps:
            return self.weights.model(params).discriminators(samples)

        def discriminator_loss(real: discriminators.Maps, false: discriminators.Maps) -> Array:
            loss = discriminators.discriminator_loss(real, false, rows)
            relativistic = discriminators.relativistic_loss(real, false, rows)
            return loss + settings.relativistic * relativistic

        def vocoder_loss(false: discriminators.Maps) -> tuple[Array, Losses]:
            losses = {
                "adversarial": discriminators.adversarial_loss(false, rows),
                "features": discriminators.feature_loss(real, false, rows),
                "relativistic": discriminators.relativistic_loss(false, real, rows),
            }
            return self.weighted(losses), losses

        real, from_real = jax.vjp(lambda params: maps(params, pieces.samples), params)
        false, from_false = jax.vjp(maps, params, samples)
        loss, to_maps = jax.value_and_grad(discriminator_loss, (0, 1))(real, false)
        grads = jax.tree.map(jnp.add, from_real(to_maps[0])[0], from_false(to_maps[1])[0])
        (_, losses), to_false = jax.value_and_grad(vocoder_loss, has_aux=True)(false)
        return Judged(loss, grads, losses, from_false(to_false)[1])

    def validate(self, params: Params, frozen: Params, batch: dict) -> Sums:
        """The log-mel difference of whole recordings, see `VocoderStage.loss`."""
        microbatch = jax.tree.map(lambda value: value[0], batch)
        return self.stage.measure(self.weights.model(params), microbatch, jax.random.key(0))


def divide(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by path -> by group and path."""
    groups: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        part, _, rest = path.partition(".")
        is_f0 = part == "vocoder" and rest.startswith("f0.")
        groups.setdefault("f0" if is_f0 else part, {})[path] = value
    return groups


def exported(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What belongs to the vocoder, by path."""
    return {path: value for name in GENERATOR for path, value in groups[name].items()}

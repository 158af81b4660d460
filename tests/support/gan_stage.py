"""A stage with two sets of parameters and two optimizers: gate fusion as a generator, and a critic.

What it learns has no meaning. B batch, S units, D width of the speech LM.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.config import Omni2Config
from omni2_jax.models.fusion import GateFusion
from omni2_jax.models.layers import Linear
from omni2_jax.train.data.records import Turn
from omni2_jax.train.examples import PAD, Item, ReplyExamples, Row, full, put
from omni2_jax.train.settings import Bucket
from omni2_jax.train.stages.base import Array, Batch, Loss, Stage
from omni2_jax.train.step import Metrics, Objective, Sums, optimizer_shardings
from omni2_jax.train.weights import Params, Weights


class UnitsOnly(ReplyExamples):
    def reply_size(self, turn: int, reply: Turn) -> int:
        assert reply.units is not None
        return len(reply.units)

    def empty(self, bucket: Bucket) -> Row:
        return {"units": full(bucket.tokens, PAD)}

    def fill(self, row: Row, item: Item) -> None:
        units = self.reply(item).units
        assert units is not None
        put(row, {"units": units})


class Pair(nnx.Module):
    """The model of the stage: a part of the checkpoint, and a part that is private to it."""

    def __init__(self, config: Omni2Config, rngs: nnx.Rngs):
        assert config.llm and config.speech_lm
        self.llm_width, self.width = config.llm.width, config.speech_lm.width
        self.fusion = GateFusion(self.llm_width, self.width, config.mix, rngs)
        self.critic = Linear(rngs, (self.width, 1), ("embed", None))

    def generate(self, key: Array, rows: int) -> Array:
        """Random numbers -> [B, D]."""
        first, second = jax.random.split(key)
        hidden = jax.random.normal(first, (rows, self.llm_width))
        return self.fusion(hidden, jax.random.normal(second, (rows, self.width)))


class ToyGan(Stage):
    parts = ("fusion",)
    trained = ("fusion",)
    private = ("critic",)
    example_type = UnitsOnly
    needs_tokenizer = False

    def model_config(self, config: Omni2Config) -> Omni2Config:
        return config

    def build(self, config: Omni2Config, rngs: nnx.Rngs) -> nnx.Module:
        return Pair(config, rngs)

    def loss(self, model: Pair, batch: Batch, key: Array) -> Loss:
        """What the critic thinks of the generator's rows."""
        rows = len(batch["units"])
        return -model.critic(model.generate(key, rows)).sum(), jnp.asarray(rows)

    def critic_loss(self, model: Pair, batch: Batch, key: Array) -> Array:
        """Hinge loss of the critic; the real rows are made from the units."""
        units = jnp.maximum(batch["units"], 0).astype(jnp.float32)
        real = jnp.sin(units.mean(1, keepdims=True) * jnp.arange(model.width))
        false = model.generate(key, len(units))
        return (
            jax.nn.relu(1 - model.critic(real)) + jax.nn.relu(1 + model.critic(false))
        ).mean() + 1e-3 * jnp.square(model.critic.kernel[...]).sum()

    def objective(self, weights: Weights, steps: int) -> "TwoOptimizers":
        return TwoOptimizers(self, weights)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GanState:
    step: Array
    generator: Params
    critic: Params
    generator_opt: optax.OptState
    critic_opt: optax.OptState


class TwoOptimizers(Objective):
    """The critic takes a step with one optimizer, then the generator takes one with another."""

    def __init__(self, stage: ToyGan, weights: Weights):
        self.stage, self.weights = stage, weights
        self.generator_optimizer = optax.adam(stage.train.optimizer.peak)
        self.critic_optimizer = optax.sgd(0.1, momentum=0.5)

    def initial(self, params: Params) -> GanState:
        generator, critic = divide(params)
        return GanState(
            jnp.zeros((), jnp.int32),
            generator,
            critic,
            self.generator_optimizer.init(generator),
            self.critic_optimizer.init(critic),
        )

    def shardings(self, params: Params, mesh: Mesh) -> Any:
        generator, critic = divide(params)
        generator_places, critic_places = divide(self.weights.shardings)
        shardings: tuple[Any, ...] = (
            sharding.replicated(mesh),
            generator_places,
            critic_places,
            optimizer_shardings(self.generator_optimizer, generator, generator_places, mesh),
            optimizer_shardings(self.critic_optimizer, critic, critic_places, mesh),
        )
        return GanState(*shardings)

    def step(
        self, state: GanState, frozen: Params, batch: dict, phase: str = ""
    ) -> tuple[GanState, Metrics]:
        key = jax.random.fold_in(jax.random.key(self.stage.train.seed), state.step)
        microbatch = jax.tree.map(lambda value: value[0], batch)

        def critic_loss(critic: Params) -> Array:
            model = self.weights.model(state.generator, critic)
            return self.stage.critic_loss(model, microbatch, key)

        loss_of_critic, grads = jax.value_and_grad(critic_loss)(state.critic)
        updates, critic_opt = self.critic_optimizer.update(grads, state.critic_opt, state.critic)
        critic: Any = optax.apply_updates(state.critic, updates)

        def generator_loss(generator: Params) -> Array:
            total, rows = self.stage.loss(self.weights.model(generator, critic), microbatch, key)
            return total / rows

        loss, grads = jax.value_and_grad(generator_loss)(state.generator)
        updates, opt = self.generator_optimizer.update(grads, state.generator_opt, state.generator)
        generator: Any = optax.apply_updates(state.generator, updates)
        new_state = GanState(state.step + 1, generator, critic, opt, critic_opt)
        return new_state, {"loss": loss, "critic_loss": loss_of_critic}

    def validate(self, params: Params, frozen: Params, batch: dict) -> Sums:
        """How large the generator's rows are: only its own parameters are given."""
        model, rows = self.weights.model(params), batch["units"].shape[1]
        size = jnp.square(model.generate(jax.random.key(0), rows)).sum()
        return {"loss": size, "terms": jnp.asarray(rows)}

    def result(self, state: GanState) -> Params:
        return state.generator


def divide(values: dict) -> tuple[dict, dict]:
    """Values by path -> (those of the generator, those of the critic)."""
    critic = {path: value for path, value in values.items() if path.startswith("critic.")}
    return {path: value for path, value in values.items() if path not in critic}, critic

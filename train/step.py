"""What one training step does, and its compilation. The state is donated to the step.

`SingleObjective` is the default: one loss, one set of parameters, one optimizer. A stage that needs
more, as a GAN with a generator and discriminators, brings another class with the methods of
`Objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.models.stacks import unstack_all
from omni2_jax.train import optimizer
from omni2_jax.train.weights import Params, Weights

if TYPE_CHECKING:
    from omni2_jax.train.stages.base import Stage

Metrics = dict[str, jax.Array]
Sums = dict[str, jax.Array]  # over rows, "loss" and its number of "terms" among them


class Objective(Protocol):
    """How a stage changes its parameters. A state is a frozen dataclass and a pytree.

    `batch` holds arrays [microbatches, B, ...]; `frozen` the parameters that do not change.
    """

    def initial(self, params: Params) -> Any:
        """The state before the first step, from the trained parameters in float32."""
        ...

    def shardings(self, params: Params, mesh: Mesh) -> Any:
        """The sharding of every array of the state."""
        ...

    def phase(self, number: int) -> str:
        """The phase of step `number`: each has a program of its own, compiled when it begins."""
        return ""

    def step(self, state: Any, frozen: Params, batch: dict, phase: str = "") -> tuple[Any, Metrics]:
        """One step. The metrics are scalars, "loss" among them; all of them must be finite."""
        ...

    def validate(self, params: Params, frozen: Params, batch: dict) -> Sums:
        """What `Stage.report` needs of a batch, for the weights `result(state)`."""
        ...

    def result(self, state: Any) -> Params:
        """The weights that are validated, sampled from and exported."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes. Random keys and data follow from (seed, step)."""

    step: jax.Array
    params: Params  # float32
    opt: optax.OptState
    ema: Params | None


class SingleObjective(Objective):
    """One loss, one set of parameters, AdamW, microbatches, and an average of the weights."""

    def __init__(self, stage: "Stage", weights: Weights, steps: int):
        self.stage, self.train, self.weights = stage, stage.train, weights
        self.optimizer = optimizer.build(self.train.optimizer, steps)
        self.schedule = optimizer.schedule(self.train.optimizer, steps)

    def initial(self, params: Params) -> State:
        average = None if self.train.optimizer.ema is None else jax.tree.map(jnp.copy, params)
        return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), average)

    def shardings(self, params: Params, mesh: Mesh) -> Any:
        """What belongs to a parameter is cut as the parameter is; the rest is replicated."""
        replicated = sharding.replicated(mesh)
        of_params = {path: self.weights.shardings[path] for path in params}
        of_optimizer = optimizer_shardings(self.optimizer, params, of_params, mesh)
        average = None if self.train.optimizer.ema is None else of_params
        return State(replicated, of_params, of_optimizer, average)  # pyright: ignore[reportArgumentType]

    def model(self, params: Params, frozen: Params):
        """The model with its trained weights cast for the computation.

        Its layers are unrolled on a CPU, where a scan takes twice as long, unless they are computed
        again in the backward pass, which is a matter of the scan.
        """
        cast = {path: leaf.astype(self.stage.compute_dtype) for path, leaf in params.items()}
        model = self.weights.model(cast, frozen)
        if jax.default_backend() == "cpu" and self.train.remat == "none":
            unstack_all(model)
        return model

    def phase(self, number: int) -> str:
        return self.stage.phase(number)

    def gradients(
        self, params: Params, frozen: Params, batch: dict, key: jax.Array, phase: str = ""
    ) -> tuple[jax.Array, jax.Array, Params]:
        """The loss of a batch, its number of terms, and the gradients, all summed."""
        stage_loss = self.stage.loss_in(phase)

        def loss(params: Params, microbatch: dict, key: jax.Array):
            return stage_loss(self.model(params, frozen), microbatch, key)

        def add(carry, xs):
            (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, *xs)
            return jax.tree.map(jnp.add, carry, (total, terms, grads)), None

        keys = jax.random.split(key, self.train.microbatches)
        zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
        if self.train.microbatches == 1:
            # XLA keeps a scan of one step as a loop, in which a CPU is three times as slow.
            return add(zero, jax.tree.map(lambda value: value[0], (batch, keys)))[0]
        return jax.lax.scan(add, zero, (batch, keys))[0]

    def update(self, state: State, grads: Params) -> tuple[State, jax.Array]:
        """The state after a step with these gradients of the mean loss, and their norm."""
        updates, opt = self.optimizer.update(grads, state.opt, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay, average = self.train.optimizer.ema, None
        if decay is not None:
            average = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, state.ema, params
            )
        return State(state.step + 1, params, opt, average), optax.tree.norm(grads)

    def step(
        self, state: State, frozen: Params, batch: dict, phase: str = ""
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(self.train.seed), state.step)
        loss, terms, grads = self.gradients(state.params, frozen, batch, key, phase)
        count = jnp.maximum(
            terms, 1
        )  # the mean is that of the batch, for any number of microbatches
        new_state, norm = self.update(state, jax.tree.map(lambda grad: grad / count, grads))
        rate = self.schedule(state.step)
        return new_state, {
            "loss": loss / count,
            "terms": terms,
            "gradient_norm": norm,
            "rate": jnp.asarray(rate),
        }

    def validate(self, params: Params, frozen: Params, batch: dict) -> Sums:
        """What a stage draws at random is the same at every validation."""
        model = self.model(params, frozen)

        def measure(microbatch: dict) -> Sums:
            return self.stage.measure(model, microbatch, jax.random.key(0))

        return jax.tree.map(lambda values: values.sum(0), jax.lax.map(measure, batch))

    def result(self, state: State) -> Params:
        return state.params if state.ema is None else state.ema


def optimizer_shardings(
    transformation: optax.GradientTransformation, params: Params, of_params: dict, mesh: Mesh
) -> optax.OptState:
    """The shardings of an optimizer's state for some parameters, given those of the parameters."""
    replicated = sharding.replicated(mesh)
    return optax.tree.map_params(
        transformation,
        lambda _, of_param: of_param,
        jax.eval_shape(transformation.init, params),
        of_params,
        transform_non_params=lambda _: replicated,
    )


def compile_step(objective: Objective, shardings: Any) -> Callable:
    """The jitted step: (state, frozen, batch, phase) -> (state, metrics).

    The state stays where it is. The phase is static.
    """
    return jax.jit(
        objective.step, static_argnums=3, donate_argnums=0, out_shardings=(shardings, None)
    )


def compile_validation(objective: Objective) -> Callable:
    """The jitted validation, (params, frozen, batch) -> sums over the rows of the batch."""
    return jax.jit(objective.validate)

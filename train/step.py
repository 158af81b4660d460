"""One optimizer step, compiled: gradients of all microbatches, AdamW, and the average of the weights. The state is donated."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.train import optimizer, stages
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.weights import Params, Weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes. Keys are drawn from (seed, step), and the data follows from them too, so nothing else is kept."""

    step: jax.Array
    params: Params  # float32
    opt: optax.OptState
    ema: Params | None


def initial(train: TrainConfig, params: Params, steps: int) -> State:
    average = None if train.optimizer.ema is None else jax.tree.map(jnp.copy, params)
    return State(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.build(train.optimizer, steps).init(params),
        average,
    )


def shardings(
    train: TrainConfig, weights: Weights, trained: Params, mesh: Mesh, steps: int
) -> State:
    """Where each array of the state lives: what belongs to a parameter with it, the rest everywhere."""
    everywhere = sharding.replicated(mesh)
    with_params = {path: weights.shardings[path] for path in trained}
    tx = optimizer.build(train.optimizer, steps)
    opt = optax.tree.map_params(
        tx,
        lambda _, where: where,
        jax.eval_shape(tx.init, trained),
        with_params,
        transform_non_params=lambda _: everywhere,
    )
    return State(everywhere, with_params, opt, None if train.optimizer.ema is None else with_params)


def cast(train: TrainConfig, params: Params) -> Params:
    """Weights for the computation. The flow's stays in float32, as its solver does."""
    dtype = jnp.float32 if train.stage == "flow" else jnp.dtype(train.dtype)
    return {path: leaf.astype(dtype) for path, leaf in params.items()}


def gradients(train: TrainConfig, weights: Weights) -> Callable:
    """(params, frozen, batch [microbatches, B, ...], key) -> the batch's loss, its number of terms and gradients, all of them sums."""

    def total(params: Params, frozen: Params, batch: dict, key: jax.Array):
        return stages.loss(weights.model(cast(train, params), frozen), train, batch, key)

    def summed(params: Params, frozen: Params, batch: dict, key: jax.Array):
        def add(carry, xs):
            (loss, terms), grads = jax.value_and_grad(total, has_aux=True)(params, frozen, *xs)
            return jax.tree.map(jnp.add, carry, (loss, terms, grads)), None

        zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, (batch, jax.random.split(key, train.microbatches)))[0]

    return summed


def update(train: TrainConfig, steps: int) -> Callable:
    """(state, gradients of the mean loss) -> (state after the step, the gradients' norm)."""
    tx, keep = optimizer.build(train.optimizer, steps), train.optimizer.ema

    def apply(state: State, grads: Params) -> tuple[State, jax.Array]:
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = (
            None
            if keep is None
            else jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.ema, params)
        )
        return State(state.step + 1, params, opt, average), optax.tree.norm(grads)

    return apply


def make(train: TrainConfig, weights: Weights, steps: int, where: State) -> Callable:
    """The compiled step: (state, frozen, batch [microbatches, B, ...]) -> (state, metrics)."""
    summed, apply, rate = (
        gradients(train, weights),
        update(train, steps),
        optimizer.schedule(train.optimizer, steps),
    )

    def step(state: State, frozen: Params, batch: dict) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        loss, terms, grads = summed(state.params, frozen, batch, key)
        count = jnp.maximum(terms, 1)  # the mean over all terms of the batch, however it was cut
        new, norm = apply(state, jax.tree.map(lambda grad: grad / count, grads))
        return new, {
            "loss": loss / count,
            "terms": terms,
            "gradient_norm": norm,
            "rate": rate(state.step),
        }

    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def make_validation(train: TrainConfig, weights: Weights) -> Callable:
    """(params, frozen, batch [microbatches, B, ...]) -> loss and terms, summed; what a stage draws at random is always the same."""

    def validate(params: Params, frozen: Params, batch: dict) -> tuple[jax.Array, jax.Array]:
        model = weights.model(cast(train, params), frozen)
        losses, terms = jax.lax.map(
            lambda micro: stages.loss(model, train, micro, jax.random.key(0)), batch
        )
        return losses.sum(), terms.sum()

    return jax.jit(validate)

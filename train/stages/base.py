"""What a training stage is: the parts it loads and trains, its examples, its loss, and how one step
changes the parameters.

A stage of one loss and one optimizer states `parts`, `trained`, `example_type` and `loss`. All
other members have a default for it, and are overridden where a stage differs.
"""

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.models.model import Model
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.examples import PAD, Examples
from omni2_jax.train.settings import Bucket, TrainConfig

if TYPE_CHECKING:
    from omni2_jax.train.step import Objective
    from omni2_jax.train.weights import Weights

Array = jax.Array
Batch = dict[str, Array]  # the arrays of a microbatch, [B, ...] each
Loss = tuple[Array, Array]  # the sum of the loss's terms, and their number


class Stage(abc.ABC):
    """One kind of training, bound to the settings of a run."""

    parts: ClassVar[tuple[str, ...]]  # parts of the checkpoint that the model consists of
    trained: ClassVar[tuple[str, ...]]  # those of `parts` that change, and are exported
    # Parts that exist during training only, as a GAN's discriminators: drawn at random, trained,
    # saved with the states of the run, and never exported.
    private: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()  # settings that belong to this stage and not to all
    example_type: ClassVar[type[Examples]]
    needs_tokenizer: ClassVar[bool] = True
    answers: ClassVar[bool] = True  # whether validation asks the model spoken questions
    needs_recordings: ClassVar[bool] = False  # whether examples are recordings of replies
    reads_units: ClassVar[bool] = False  # whether examples hold units of replies
    scored: ClassVar[tuple[str, ...]] = ()  # language models whose logits the loss computes

    def __init__(self, train: TrainConfig):
        self.train = train
        self.validation: Examples | None = None  # the validation's, before the first `measure`

    @classmethod
    def faults(cls, train: TrainConfig) -> list[str]:
        """What is wrong with the settings that belong to this stage, one line each."""
        return []

    # Parameters

    @property
    def loaded(self) -> tuple[str, ...]:
        """The parts that are read from the checkpoint; of others only the shapes are needed."""
        return self.parts

    def is_trained(self, path: str) -> bool:
        """Whether the parameter at this path ("llm.layers.mlp.up.kernel") is trained."""
        return path.partition(".")[0] in (*self.trained, *self.private)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype that trained weights are cast to for the computation."""
        return jnp.dtype(self.train.dtype)

    def initial(self, path: str) -> LazyArray | None:
        """The value that a trained parameter starts from, if it is not the checkpoint's."""
        return None

    # Configurations of the model

    def configure(self, config: Omni2Config) -> Omni2Config:
        """The configuration of the exported checkpoint, from that of the one to start from."""
        return config

    def drawn(self, config: Omni2Config) -> set[str]:
        """The parts that start at random instead of from a checkpoint of this configuration."""
        return set(self.train.reset)

    def model_config(self, config: Omni2Config) -> Omni2Config:
        """The configuration of the model that is read from the checkpoint."""
        return config.only(*self.parts)

    def train_config(self, config: Omni2Config) -> Omni2Config:
        """The configuration of the model in training, which may have more parameters (LoRA)."""
        return self.model_config(config)

    def sample_config(self, config: Omni2Config) -> Omni2Config:
        """The configuration of the model that answers validation questions."""
        return config

    def build(self, config: Omni2Config, rngs: nnx.Rngs) -> nnx.Module:
        """The model, one attribute for each part."""
        return Model(config, rngs)

    # Data

    def open_data(self, path: str, split: str) -> Dataset:
        """The data set at `path`. split: "data" or "validation".

        Raises ValueError if it cannot be used.
        """
        return Dataset(path)

    def examples(
        self, config: Omni2Config, tokenizer: Tokenizer | None, data: Dataset, split: str
    ) -> Examples:
        """The examples of a data set. split: "data" or "validation".

        Raises ValueError if something else that the examples need cannot be read.
        """
        return self.example_type(self.train, config, tokenizer, data)

    # Computation

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, key: Array) -> Loss:
        """The loss of one microbatch -> (the sum of its terms [], their number []).

        model: its trained parts are in `compute_dtype`. batch: {name: [B, ...]}. key: for
        everything that the stage draws at random.
        """

    def phase(self, number: int) -> str:
        """The phase of step `number`, for a stage whose loss is another one in its first steps."""
        return ""

    def loss_in(self, phase: str) -> Callable[[Any, Batch, Array], Loss]:
        """The loss of the steps of a phase."""
        return self.loss

    def measure(self, model: Any, batch: Batch, key: Array) -> dict[str, Array]:
        """Sums over the rows of a validation batch, of which `report` makes the measurements."""
        loss, terms = self.loss(model, batch, key)
        return {"loss": loss, "terms": terms}

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The measurements of a validation, by name, from the sums over all of its batches.

        Names with a slash are details, which are written and not printed.
        """
        return {"validation_loss": float(sums["loss"]) / max(int(sums["terms"]), 1)}

    def objective(self, weights: "Weights", steps: int) -> "Objective":
        """What one step does; by default one optimizer minimizes `loss`.

        A stage with several optimizers or losses brings its own `Objective`.
        """
        from omni2_jax.train.step import SingleObjective

        return SingleObjective(self, weights, steps)

    def frozen_work(self) -> dict[str, Callable[[Any, Batch], Array | tuple[Array, ...]]]:
        """What the loss computes before all trained parts, by name; benchmarks.train times it."""
        return {}

    def flops(
        self, config: Omni2Config, shapes: Mapping[str, jax.ShapeDtypeStruct], bucket: Bucket
    ) -> dict[str, tuple[float, float]]:
        """FLOPs of a batch by part: (forward, forward and backward). Empty if not known."""
        from omni2_jax.train import flops

        return flops.count(self, config, shapes, bucket)


def positions(ids: Array) -> Array:
    """Positions of right-padded rows [..., T]: 0, 1, 2 ... and -1 for padding."""
    return jnp.where(ids == PAD, -1, jnp.arange(ids.shape[-1]))

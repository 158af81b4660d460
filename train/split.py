"""A data set as a run reads it: its examples, measured and gathered in batches."""

from dataclasses import dataclass

import jax
import rich.progress
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.console import console
from omni2_jax.train.data.loader import Batch, Catalogue, Loader, catalogue, schedule
from omni2_jax.train.examples import Examples
from omni2_jax.train.stages.base import Stage


@dataclass(frozen=True)
class Split:
    """The training data or the validation data of a run."""

    examples: Examples
    catalogue: Catalogue
    batches: list[Batch]
    loader: Loader


def open_split(
    stage: Stage,
    config: Omni2Config,
    tokenizer: Tokenizer | None,
    path: str,
    name: str,
    mesh: Mesh,
) -> Split:
    """Open a data set and measure all of its examples. name: "data" or "validation".

    Raises ValueError if it is damaged, if it has no example for the stage, or if the mesh does not
    divide the batch.
    """
    train = stage.train
    examples = stage.examples(config, tokenizer, stage.open_data(path, name), name)
    indices = rich.progress.track(
        range(len(examples)),
        f"measuring {path}",
        console=console,
        transient=True,
        disable=jax.process_index() != 0,
    )
    measured = catalogue(examples, indices, train.buckets, train.strict)
    batches = schedule(measured, train)
    loader = Loader(examples, measured, batches, sharding.row_sharding(mesh))
    return Split(examples, measured, batches, loader)

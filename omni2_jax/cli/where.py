"""Options of commands that run a job (`omni2_jax.jobs`): where its items are processed.

A command takes them as parameters, and passes `Where(workers, ray, shard, ray_gpus)` on; one that
has no use for GPUs leaves out `ray_gpus`.
"""

from typing import Annotated

import typer

from omni2_jax.jobs.where import Shard, parse_shard


def shard(text: str) -> Shard:
    """The shard that an option names. Raises BadParameter for another text."""
    try:
        return parse_shard(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=10_000,
        help="Items that are processed at the same time. [default: it depends on the command; with "
        "--ray, as many as fit the cluster]",
        show_default=False,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|ADDRESS",
        help="Process the items on the Ray cluster that this machine is part of; auto finds it, "
        "HOST:PORT names it.",
        show_default=False,
    ),
]
ShardOption = Annotated[
    Shard | None,
    typer.Option(
        "--shard",
        parser=shard,
        metavar="I/N",
        help="Process every N-th item only, from the item I = 0 to N - 1 on. When all N shards are "
        "complete, the same command without --shard merges them.",
        show_default=False,
    ),
]
RayGpusOption = Annotated[
    float,
    typer.Option(
        "--ray-gpus", min=0, help="GPUs that Ray reserves for each worker, as 1, 0.5 or 0 for none."
    ),
]

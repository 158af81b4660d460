"""What a run is taken up from: RUN/run.json, what it was told, and RUN/steps/STEP/, the newest few of its states.

States are saved asynchronously, whole or not at all, and restored on any mesh.
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from omni2_jax.checkpoint import checksums
from omni2_jax.files import first_line
from omni2_jax.train.settings import MUTABLE_SETTINGS, flat
from omni2_jax.train.step import State


def check(run: Path, told: dict) -> None:
    """Raise ValueError, naming what differs, unless `run` is new or a run that was told the same."""
    path = run / "run.json"
    if not path.exists():
        if run.exists() and not (
            run.is_dir() and all(file == path.with_suffix(".partial") for file in run.iterdir())
        ):
            raise ValueError(f"{run} exists and is not a run; give a new directory")
        return
    try:
        before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(told)))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a run: {error!r}") from None
    keys = {
        key: key.removeprefix("config.")
        for key, value in now.items()
        if not isinstance(value, dict) and before.get(key) != value
    }
    differing = [
        name
        for name in dict.fromkeys(keys.values())
        if name.partition(".")[0] not in MUTABLE_SETTINGS
    ]
    if differing:
        raise ValueError(
            f"{run} holds a run with another {', '.join(differing)}; give another --out, or the same settings"
        )


def remember(run: Path, told: dict) -> None:
    """Write run.json."""
    work = run / "run.partial"
    run.mkdir(parents=True, exist_ok=True)
    work.write_text(json.dumps(told, indent=1) + "\n")
    work.replace(run / "run.json")


class Checkpoints:
    """Orbax writes in the background and renames when all is there, so what a kill interrupts is not seen again."""

    def __init__(self, run: Path, keep: int):
        self.directory = run.absolute() / "steps"
        self.manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=checksums.tree_handler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, create=True
            ),
        )

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: State, step: int) -> None:
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.PyTreeSave(fields(state)))

    def restore(self, step: int, shapes: State, shardings: State) -> State:
        """The state of a step, cut as `shardings` say. Raises ValueError if it is damaged or of another model."""
        target = jax.tree.map(
            lambda leaf, cut: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut),
            shapes,
            shardings,
        )
        item = fields(target)
        args = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item))
        try:
            return State(**self.manager.restore(step, args=args))
        except Exception as error:  # Orbax and tensorstore raise many kinds
            path, cause = self.directory / str(step), first_line(error.__cause__ or error)
            raise ValueError(
                f"{path} cannot be restored, is it damaged or of another run? {cause}"
            ) from None

    def close(self) -> None:
        """Wait until what was saved is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def fields(state: State) -> dict:
    return {"step": state.step, "params": state.params, "opt": state.opt, "ema": state.ema}

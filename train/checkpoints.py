"""Saves of a running training: asynchronous, whole or not at all, on any mesh. RUN/steps/STEP/, the newest few of them."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from omni2_jax.checkpoint import first_line
from train.step import State


class Checkpoints:
    """Orbax writes in the background and renames when all is there, so what a kill interrupts is not seen again."""

    def __init__(self, run: Path, keep: int):
        self.directory = run.absolute() / "steps"
        self.manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        )

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: State, step: int) -> None:
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(fields(state)))

    def restore(self, step: int, shapes: State, shardings: State) -> State:
        """The state of a step, cut as `shardings` say. Raises ValueError if it is damaged or of another model."""
        target = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)
        try:
            return State(**self.manager.restore(step, args=ocp.args.StandardRestore(fields(target))))
        except Exception as error:  # Orbax and tensorstore raise many kinds
            where = self.directory / str(step)
            raise ValueError(f"{where} cannot be restored, is it damaged or of another run? {first_line(error)}") from None

    def close(self) -> None:
        """Wait until what was saved is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def fields(state: State) -> dict:
    return {"step": state.step, "params": state.params, "opt": state.opt, "ema": state.ema}

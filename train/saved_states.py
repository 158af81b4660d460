"""What a run is resumed from: RUN/run.json, its settings, and RUN/steps/STEP/, its last few states.

RUN/.lock keeps another command out of a run. States are saved in the background and restored on any
mesh.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from omni2_jax import remote
from omni2_jax.checkpoint import checksums
from omni2_jax.files import atomic_write, first_line, is_partial, open_locked
from omni2_jax.train.overrides import flat
from omni2_jax.train.settings import MUTABLE_SETTINGS, RENAMED

LOCK = ".lock"


def check_metadata(run: Path, metadata: dict) -> None:
    """Raise ValueError, naming what differs, unless `run` is new or has the same metadata."""
    path = run / "run.json"
    if not path.exists():
        content = [path for path in run.iterdir() if path.name != LOCK] if run.is_dir() else [run]
        if run.exists() and not all(map(is_partial, content)):
            raise ValueError(f"{run} exists and is not a run; give a new directory")
        return
    try:
        before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(metadata)))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a run: {error!r}") from None
    check_names(path, before)
    differing = {
        key.removeprefix("config."): None
        for key, value in now.items()
        if not isinstance(value, dict) and before.get(key) != value
    }
    fixed = [name for name in differing if name.partition(".")[0] not in MUTABLE_SETTINGS]
    if fixed:
        names = ", ".join(fixed)
        raise ValueError(
            f"{run} holds a run with another {names}; give another --out, or the same settings"
        )


def check_names(path: Path, before: dict) -> None:
    """Raise ValueError if a run.json, as a flat dict, has settings that have been renamed since."""
    old = [name for name in RENAMED if f"config.{name}" in before]
    if old:
        names = ", ".join(f"{name} is now {RENAMED[name]}" for name in old)
        raise ValueError(
            f"{path} was written by an older version, whose settings had other names ({names}); "
            "start a new run with another --out"
        )


def locked(run: Path) -> contextlib.AbstractContextManager:
    """Within this context no other process can lock `run`, which is made if it is missing.

    Raises ValueError if another process has locked it. In Cloud Storage nothing is locked.
    """
    if remote.is_remote(run):
        return contextlib.nullcontext()
    run.mkdir(parents=True, exist_ok=True)
    return open_locked(run / LOCK, f"{run} is in use by another omni2 train")


def write_metadata(run: Path, metadata: dict) -> None:
    """Write run.json. Raises ValueError if that is not possible."""
    run.mkdir(parents=True, exist_ok=True)
    with atomic_write(run / "run.json") as file:
        file.write(json.dumps(metadata, indent=1) + "\n")


class SavedStates:
    """The saved states of a run. When this context ends, all of them are on the disk.

    Orbax writes in the background and renames a state when it is complete, so an interrupted one is
    never restored.
    """

    def __init__(self, run: Path, keep: int):
        self.directory = remote.absolute(run) / "steps"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
        )
        self.manager = ocp.CheckpointManager(
            self.directory, item_handlers=checksums.tree_handler(), options=options
        )

    def __enter__(self) -> "SavedStates":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The last step that was saved; None if there is none."""
        return self.manager.latest_step()

    def save(self, state: Any, step: int) -> None:
        """Save the state after so many steps, a dataclass of arrays, unless it is saved already."""
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.PyTreeSave(fields(state)))

    def restore(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The state after so many steps, each array cut as `shardings` say.

        Raises ValueError if the files are damaged or belong to another model.
        """
        target = jax.tree.map(
            lambda leaf, placement: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=placement
            ),
            shapes,
            shardings,
        )
        item = fields(target)
        args = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item))
        try:
            return dataclasses.replace(target, **self.manager.restore(step, args=args))
        except Exception as error:  # Orbax and tensorstore raise many kinds
            path, cause = self.directory / str(step), first_line(error.__cause__ or error)
            raise ValueError(
                f"{path} cannot be restored, is it damaged or of another run? {cause}"
            ) from None


def fields(state: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, not those of dataclasses within it."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}

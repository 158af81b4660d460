"""A run from its first step to its last, and resumed wherever it was interrupted.

    RUN/run.json  steps/STEP/  final/ (a complete checkpoint); what else is in RUN see reporter.py
    and validator.py

What a step computes follows from the settings and the step's number alone, so a resumed run is
equal to an uninterrupted one to the bit.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from omni2_jax import remote, sharding
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.console import say
from omni2_jax.devices import Device
from omni2_jax.train import saved_states, step, unit_origin, weights
from omni2_jax.train.dialogues import speech_positions
from omni2_jax.train.reporter import Reporter, StepResult
from omni2_jax.train.saved_states import SavedStates
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.split import Split, open_split
from omni2_jax.train.stages import stage_of
from omni2_jax.train.validator import Validator

STOP_SYNC_INTERVAL = 10  # steps between two agreements of several processes on whether to stop


class Run:
    """A training run: `Run(train, out).go()`.

    Everything that can be checked is checked here, before anything is compiled or written. devices:
    default all. Raises ValueError naming what is wrong with the settings, the checkpoint, the data
    or `out`.
    """

    def __init__(self, train: TrainConfig, out: Path, devices: Sequence[Device] | None = None):
        self.train, self.out, self.stage = train, out, stage_of(train)
        for name in ("checkpoint", "data"):
            if not getattr(train, name):
                raise ValueError(
                    f"{name} is not given; set it in the config, or with --set {name}=PATH"
                )
        self.start = remote.as_path(train.checkpoint)
        if self.start.resolve() in (out / "final").resolve().parents:
            raise ValueError(
                f"{out} lies within the checkpoint {self.start}; give a directory outside of it"
            )
        self.config = weights.configure(self.stage, self.start)
        self.mesh = sharding.make_mesh(*dataclasses.astuple(train.mesh), devices=devices)
        self.tokenizer = None
        if self.stage.needs_tokenizer:
            self.tokenizer = Tokenizer(self.start, self.config, speech_positions(self.config))
        self.data = self.open(train, train.data, "data")
        self.validation = None
        if train.validation:
            once = dataclasses.replace(train, steps=None, epochs=1.0, seed=0)
            self.validation = self.open(once, train.validation, "validation")
        self.units_note = self.compare_units()
        self.steps = len(self.data.batches)
        self.metadata = {
            "config": dataclasses.asdict(train),
            "examples": len(self.data.catalogue.items),
            "steps": self.steps,
        }
        saved_states.check_metadata(out, self.metadata)
        self.stop_signal = threading.Event()

    def open(self, train: TrainConfig, path: str, name: str) -> Split:
        """A data set, all of its examples measured. Raises ValueError if it cannot be used."""
        return open_split(stage_of(train), self.config, self.tokenizer, path, name, self.mesh)

    def go(self) -> bool:
        """Train to the end, or until SIGTERM or Ctrl-C; at the end, write RUN/final.

        Returns whether the last step is done. Raises ValueError if a metric of a step is not
        finite, or if another process is working in RUN.
        """
        with sharding.use(self.mesh), contextlib.ExitStack() as stack:
            self.weights, trained, self.frozen = weights.load(self.stage, self.start, self.mesh)
            self.objective = self.stage.objective(self.weights, self.steps)
            if jax.process_index() == 0:
                stack.enter_context(saved_states.locked(self.out))
                saved_states.write_metadata(self.out, self.metadata)
                if self.units_note:
                    say(self.units_note)
            weights.sync("run.json")
            with SavedStates(self.out, self.train.keep) as saved:
                shardings = self.objective.shardings(trained, self.mesh)
                state, first = self.first_state(trained, shardings, saved)
                del trained  # they are in the state, and it is donated to every step
                self.take_step = step.compile_step(self.objective, shardings)
                with stop_on_signals(self.stop_signal):
                    state, done = self.steps_from(first, state, saved)
            self.finish(state, done)
            return done == self.steps

    def compare_units(self) -> str:
        """A note if the units that the stage reads are not all of one speech tokenizer, else ""."""
        if not self.stage.reads_units:
            return ""
        splits = {"data": self.data, "validation": self.validation}
        data = {name: split.examples.data for name, split in splits.items() if split}
        return unit_origin.disagreement(self.start, data)

    def first_state(self, trained: weights.Params, shardings: Any, saved: SavedStates):
        """The last saved state or a new one, and its step. Empties `trained`, to free memory."""
        begin = jax.jit(self.objective.initial, out_shardings=shardings, donate_argnums=0)
        if not saved.latest:
            return begin(trained), 0
        shapes = jax.eval_shape(begin, trained)
        trained.clear()
        return saved.restore(saved.latest, shapes, shardings), saved.latest

    def steps_from(self, first: int, state: Any, saved: SavedStates) -> tuple[Any, int]:
        """Train until the last step or a signal; return the state and the number of steps done.

        Both are saved. After a signal nothing is validated: the resumed run validates first.
        """
        train, pending, done = self.train, None, first
        reporter = Reporter(self.stage, self.out, self.data, self.weights, first)
        reporter.print_table(self.frozen)
        validator = self.validator()
        with reporter:
            if self.is_validation_due(first) and self.lacks_validation(reporter):
                self.validate(validator, state, first, reporter)
            batches = reporter.clock.timed(self.data.loader.start(first))
            for number, (batch, rows) in enumerate(batches, first):
                reporter.begin_step(number)
                phase = self.objective.phase(number)
                state, metrics = self.take_step(state, self.frozen, batch, phase)
                # The previous step is reported while this one is computed.
                reporter.end_step(pending)
                pending, done = StepResult(number, metrics, rows), number + 1
                is_last = done == self.steps
                stops = not is_last and self.should_stop(done)
                saves = stops or is_last or done % train.save_every == 0
                validates = not stops and self.is_validation_due(done)
                if saves or validates:
                    # A state is saved only if its step's metrics are finite.
                    reporter.end_step(pending)
                    pending = None
                if saves:
                    reporter.push()  # before the state: a resumed run has the lines of all steps
                    saved.save(state, done)
                if validates:
                    self.validate(validator, state, done, reporter)
                if stops:
                    break
        return state, done

    def is_validation_due(self, done: int) -> bool:
        """Whether a run validates its state after `done` steps."""
        return done == self.steps or done % self.train.validate_every == 0

    def validate(
        self, validator: Validator | None, state: Any, done: int, reporter: Reporter
    ) -> None:
        """Validate the state after `done` steps; without a validator do nothing."""
        if validator:
            validator.run(self.objective.result(state), done, reporter)
            reporter.clock.read()  # validation is no part of the next step's time

    def lacks_validation(self, reporter: Reporter) -> bool:
        """Whether the run was interrupted before the validation of the step that it resumes at."""
        metrics = reporter.metrics  # of the first process
        lacks = metrics is not None and not metrics.validated
        return reporter.first > 0 and any_process(lacks)

    def validator(self) -> Validator | None:
        """The validator of this run; None without validation data."""
        if self.validation is None:
            return None
        return Validator(
            self.stage, self.objective, self.validation, self.frozen, self.start, self.tokenizer
        )

    def should_stop(self, done: int) -> bool:
        """Whether to save and exit after so many steps.

        Several processes agree on it every STOP_SYNC_INTERVAL steps, since they wait for one
        another to do so.
        """
        if jax.process_count() == 1:
            return self.stop_signal.is_set()
        if done % STOP_SYNC_INTERVAL:
            return False
        return any_process(self.stop_signal.is_set())

    def finish(self, state: Any, done: int) -> None:
        """Export the checkpoint if the last step is done, and print how the run ended."""
        final, leads = self.out / "final", jax.process_index() == 0
        if done < self.steps:
            if leads:
                say(f"stopped at step {done} of {self.steps}; the same command resumes it")
            return
        trained = self.objective.result(state)
        weights.export(self.stage, self.start, trained, self.frozen, final)
        if leads:
            parts = ", ".join(self.stage.trained)
            say(f"done: {final} is a checkpoint with {parts} trained")


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process of the run; all of them have to call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def stop_on_signals(event: threading.Event) -> Iterator[None]:
    """Within this block SIGTERM and Ctrl-C set an event instead of ending the process."""

    def set_event(*_: object) -> None:
        event.set()

    is_main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    handlers = {kind: signal.signal(kind, set_event) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)

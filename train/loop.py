"""A run from its first step to its last: read, step, report, validate, save; and taken up again wherever it was cut off.

    RUN/run.json  left-out.txt  steps/STEP/  metrics.jsonl  tensorboard/  samples/STEP/  profile/  final/ (a checkpoint that talks)

What a step does follows from (configuration, step) alone, so a run that is killed and started again goes on bit for bit.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import rich.progress
import rich.table
import rich.text
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from omni2_jax import sharding
from omni2_jax.audio import recordings
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import Omni2Config
from omni2_jax.train import checkpoints, flops, stages, step, weights
from omni2_jax.train.checkpoints import Checkpoints
from omni2_jax.train.data.dataset import Dataset, RecordError
from omni2_jax.train.data.loader import Batch, Catalogue, Loader, catalogue, filled, schedule
from omni2_jax.train.examples import Examples
from omni2_jax.train.hidden_states import States
from omni2_jax.train.metrics import Clock, Line, Metrics, console
from omni2_jax.train.sampler import Sampler
from omni2_jax.train.settings import TrainConfig

STOP_SYNC_INTERVAL = 10  # steps


@dataclass(frozen=True)
class Data:
    """A data set as a stage sees it."""

    examples: Examples
    found: Catalogue
    batches: list[Batch]
    loader: Loader


class Run:
    """Everything a run needs, checked before anything is compiled: `Run(train, out).go()`, on all devices unless some are given."""

    def __init__(self, train: TrainConfig, out: Path, devices: Sequence[jax.Device] | None = None):
        self.train, self.out = train, out
        self.leads = jax.process_index() == 0
        for name in ("checkpoint", "data"):
            if not getattr(train, name):
                raise ValueError(
                    f"{name} is not given; set it in the config, or with --set {name}=PATH"
                )
        self.start = Path(train.checkpoint)
        if self.start.resolve() in (out / "final").resolve().parents:
            raise ValueError(
                f"{out} lies within the checkpoint {self.start}; give a directory outside of it"
            )
        self.config = weights.configure(train, self.start)
        self.mesh = sharding.make_mesh(*dataclasses.astuple(train.mesh), devices=devices)
        self.tokenizer = None
        if train.stage != "flow":
            self.tokenizer = Tokenizer(self.start, self.config, positions(self.config))
        self.data = self.open(train, train.data, "data")
        self.validation = (
            self.open(validating(train), train.validation, "validation")
            if train.validation
            else None
        )
        self.steps = len(self.data.batches)
        self.told = {
            "config": dataclasses.asdict(train),
            "examples": len(self.data.found.items),
            "steps": self.steps,
        }
        checkpoints.check(out, self.told)
        self.stopping, self.tracing, self.named = threading.Event(), False, 0

    def open(self, train: TrainConfig, path: str, name: str) -> Data:
        """A data set, all of its examples measured. Raises ValueError if there is nothing to train on."""
        data = Dataset(path)
        hidden = (
            States(Path(train.hidden) / name, data, self.config.llm.width) if train.hidden else None
        )
        examples = Examples(train, self.config, self.tokenizer, data, hidden)
        indices = range(len(examples.data))
        bar = rich.progress.track(
            indices, f"measuring {path}", console=console, transient=True, disable=not self.leads
        )
        found = catalogue(examples, bar, train.buckets, train.strict)
        batches = schedule(found, train)
        where = NamedSharding(self.mesh, PartitionSpec(sharding.Rules().batch))
        return Data(examples, found, batches, Loader(examples, found, batches, where))

    def go(self) -> None:
        """Train to the end, or until SIGTERM; then write RUN/final. Raises ValueError if the loss is not finite."""
        with sharding.use(self.mesh):
            self.weights, trained, self.frozen = weights.load(self.train, self.start, self.mesh)
            where = step.shardings(self.train, self.weights, trained, self.mesh, self.steps)
            begin = jax.jit(
                lambda params: step.initial(self.train, params, self.steps),
                out_shardings=where,
                donate_argnums=0,
            )
            self.take = step.make(self.train, self.weights, self.steps, where)
            self.validate = step.make_validation(self.train, self.weights)
            if self.leads:
                checkpoints.remember(self.out, self.told)
            weights.sync("run.json")
            with contextlib.closing(Checkpoints(self.out, self.train.keep)) as saved:
                first, shapes = saved.latest or 0, jax.eval_shape(begin, trained)
                state = None if first else begin(trained)
                del trained  # before others are restored, which need the memory
                state = state or saved.restore(first, shapes, where)
                self.tell(first)
                self.sampler = Sampler.of(self.train, self.start, self.tokenizer)
                self.metrics = Metrics(self.out, first) if self.leads else None
                with terminated(self.stopping):
                    state, reached = self.steps_from(first, state, saved)
                saved.save(state, reached)
            if self.metrics:
                self.metrics.close()
            if reached < self.steps:
                self.say(
                    f"stopped at step {reached} of {self.steps}; the same command goes on from there"
                )
                return
            weights.export(
                self.train, self.start, self.answering(state), self.frozen, self.out / "final"
            )
            self.say(
                f"done: {self.out / 'final'} is a checkpoint with {', '.join(weights.STAGES[self.train.stage].trained)} trained"
            )

    def steps_from(
        self, first: int, state: step.State, saved: Checkpoints
    ) -> tuple[step.State, int]:
        """Steps until the last, or until somebody asks to stop: (state, steps done)."""
        train, clock, pending, reached = self.train, Clock(), None, first
        with Line(f"stage {train.stage}", self.steps, first) if self.leads else NoLine() as line:
            for number, (batch, raw) in enumerate(
                timed(self.data.loader.start(first), clock), first
            ):
                self.trace(number)
                state, measured = self.take(state, self.frozen, batch)
                # The step before this one is looked at while this one is computed.
                self.look(pending, line, clock)
                pending, reached = (number, measured, raw), number + 1
                due = lambda every, reached=reached: reached % every == 0  # noqa: E731
                if (
                    due(train.save_every)
                    or due(train.validate_every)
                    or self.asked_to_stop(reached)
                ):
                    self.look(pending, line, clock)
                    pending = None
                if due(train.save_every):
                    saved.save(state, reached)
                if due(train.validate_every):
                    self.check(state, reached)
                    clock.look()
                if self.asked_to_stop(reached):
                    break
            self.look(pending, line, clock)
        return state, reached

    def look(self, pending, line, clock: Clock) -> None:
        """Report a step. Raises ValueError, after saving its batch, if its loss is not a number."""
        if pending is None:
            return
        number, measured, raw = pending
        clock.steps += 1
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        if not np.isfinite(values["loss"]) or not np.isfinite(values["gradient_norm"]):
            path = self.out / f"bad-batch-{number}-{jax.process_index()}.npz"
            np.savez_compressed(path, **raw)
            raise ValueError(
                f"step {number}: the loss is {values['loss']}, its gradient's norm {values['gradient_norm']}; its batch is {path}"
            )
        if self.tracing and number >= min(self.train.profile[1], self.steps - 1):
            jax.profiler.stop_trace()
            self.tracing = False
        seconds, waited = clock.look()
        bucket = self.data.batches[number].bucket
        values |= {
            "tokens_per_s": self.tokens(bucket) / seconds,
            "seconds": seconds,
            "data_wait": waited,
        }
        values |= {"damaged": self.name_damaged()}
        rate = self.train.peak_flops or flops.peak(jax.devices()[0])
        if rate:
            values["mfu"] = (
                flops.step(self.train, self.config, self.weights.shapes, bucket)
                / seconds
                / rate
                / self.mesh.size
            )
        if self.metrics:
            self.metrics.write(number, values)
            line.show(number + 1, values)

    def name_damaged(self) -> int:
        """How many records could not be read so far; each is told once."""
        reasons = list(self.data.loader.source.damaged.values())
        for reason in reasons[self.named :]:
            console.print(f"{reason}; left out", soft_wrap=True, markup=False, highlight=False)
        self.named = len(reasons)
        return self.named

    def tokens(self, bucket) -> int:
        """Positions of a batch, padding with them: what the devices work on."""
        return self.train.batch * (bucket.positions + max(bucket.clips, 1) * bucket.tokens)

    def check(self, state: step.State, reached: int) -> None:
        """Loss on the validation data, and a few of its questions answered."""
        if self.validation is None:
            return
        params, total, terms = self.answering(state), 0.0, 0
        for batch, _ in self.validation.loader.start(0):
            sums = jax.device_get(self.validate(params, self.frozen, batch))
            total, terms = total + float(sums[0]), terms + int(sums[1])
        loss = total / max(terms, 1)
        if self.metrics:
            self.metrics.write(reached - 1, {"validation_loss": loss})
            self.say(f"step {reached}: validation loss {loss:.4f}")
        if self.sampler:
            self.sampler.update(weights.merged(params, self.frozen))
            self.sample(reached)

    def sample(self, reached: int) -> None:
        """Answers to the first validation questions, into RUN/samples/STEP/ and TensorBoard."""
        folder, data = self.out / "samples" / str(reached), self.validation.examples.data
        folder.mkdir(parents=True, exist_ok=True)
        for index in list(dict.fromkeys(item.dialogue for item in self.validation.found.items))[
            : self.train.samples
        ]:
            try:
                question = data.dialogue(index).turns[0]
                if question.clip is None:
                    continue
                samples = data.clip(question.clip)
            except RecordError as error:
                self.say(f"{error}; no sample of it")
                continue
            answer = self.sampler.answer(recordings.fit(samples, over="truncate")[0])
            (folder / f"{index}.txt").write_text(
                f"{question.text}\n{answer.text}\n{answer.unit_text}\n"
            )
            self.metrics.text(reached, f"sample {index}", f"{question.text} -> {answer.text}")
            if answer.waveform is not None and len(answer.waveform):
                recordings.save(folder / f"{index}.wav", answer.waveform)
                self.metrics.sound(
                    reached, f"sample {index}", answer.waveform, recordings.OUTPUT_RATE
                )
            self.say(f"  {question.text!r} -> {answer.text!r}, {len(answer.units)} units")

    def answering(self, state: step.State) -> weights.Params:
        """The weights that are validated and exported."""
        return state.params if state.ema is None else state.ema

    def asked_to_stop(self, reached: int) -> bool:
        """Whether to save and exit; several processes agree on it every few steps, as they have to wait for one another to do so."""
        if jax.process_count() == 1:
            return self.stopping.is_set()
        if reached % STOP_SYNC_INTERVAL:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.stopping.is_set())).any())

    def trace(self, number: int) -> None:
        """Before a step: begin to trace if it is to be; `look` ends it, when the last such step is done."""
        first, last = self.train.profile or (0, -1)
        if self.leads and first <= number <= last and not self.tracing:
            jax.profiler.start_trace(str(self.out / "profile"))
            self.tracing = True

    def tell(self, first: int) -> None:
        """What is about to happen, as a table."""
        if not self.leads:
            return
        count = lambda params: sum(leaf.size for leaf in params) / 1e6  # noqa: E731
        trained = [
            leaf
            for path, leaf in self.weights.shapes.items()
            if stages.is_trained(self.train, path)
        ]
        sizes = {}
        for batch in self.data.batches:
            sizes[batch.bucket] = sizes.get(batch.bucket, 0) + 1
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        table = rich.table.Table(show_header=False, title=f"stage {self.train.stage}")
        rows = {
            "parameters": f"{count(trained):.1f} M trained, {count(self.frozen.values()):.1f} M frozen",
            "devices": f"{self.mesh.size} x {jax.devices()[0].device_kind}, mesh {mesh}",
            "examples": f"{len(self.data.found.items)}, left out {len(self.data.found.skipped)}",
            "left out because": "\n".join(self.data.found.reasons(5)),
            "steps": f"{self.steps} of {self.train.batch} rows"
            + (f", from {first} on" if first else ""),
            "batches": "\n".join(
                f"{n} of {b.clips} clips, {b.positions} positions, {b.tokens} tokens"
                for b, n in sizes.items()
            ),
            "padding": f"{100 * (1 - filled(self.data.found, self.data.batches)):.0f} % of what is computed",
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, rich.text.Text(value))
        console.print(table)
        (self.out / "left-out.txt").write_text(
            "".join(f"{name}: {reason}\n" for name, reason in self.data.found.skipped.items())
        )

    def say(self, text: str) -> None:
        if self.leads:
            console.print(text, soft_wrap=True, markup=False, highlight=False)


def positions(config: Omni2Config) -> int:
    """LLM positions of a clip of 30 s."""
    return (
        config.speech_encoder.frames // config.adapter.stride
        if config.speech_encoder and config.adapter
        else 0
    )


def validating(train: TrainConfig) -> TrainConfig:
    """The same, going through its data once."""
    return dataclasses.replace(train, steps=None, epochs=1.0, seed=0)


def timed(batches: Iterator, clock: Clock) -> Iterator:
    """The same batches; how long each was waited for goes to the clock."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        clock.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch


class terminated:  # noqa: N801 (used like a function)
    """Within this block SIGTERM and Ctrl-C set an event instead of ending the process."""

    def __init__(self, event: threading.Event):
        self.event, self.before = event, {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {
                kind: signal.signal(kind, lambda *_: self.event.set())
                for kind in (signal.SIGTERM, signal.SIGINT)
            }

    def __exit__(self, *_) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class NoLine:
    """What the processes that do not report show."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

"""`mmfm train`: from a configuration and a store to a trained run, or on from where the run stopped.

`train` puts the parts of a run together; `Loop` takes the steps, and knows no store, model or folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from mmfm_jax.config.training import TrainConfig
from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.parallel.processes import meet
from mmfm_jax.screen import screen
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.fit import check_fit
from mmfm_jax.train.flops import step_flops
from mmfm_jax.train.lock import RunLock
from mmfm_jax.train.meter import Meter
from mmfm_jax.train.optimizer import constant_until, make_optimizer
from mmfm_jax.train.profile import Profiler
from mmfm_jax.train.start import start_or_resume
from mmfm_jax.train.state import TrainState, initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import jitted_step, make_validation
from mmfm_jax.train.stop import StopSignal
from mmfm_jax.train.telemetry import Telemetry
from mmfm_jax.train.validation import Validation
from mmfm_jax.train.watchdog import Watchdog

AHEAD = 2  # steps given to the device before the metrics of the first are read
PROFILE = "profile"


@dataclass(frozen=True)
class Outcome:
    step: int
    stopped: bool
    """By SIGTERM, before the last step."""


def train(
    experiment: Experiment, run: str | Path, console: Console | None = None, clock: Clock | None = None
) -> Outcome:
    """Trains to `experiment.train.steps`; a run that holds a checkpoint goes on from its newest.

    `clock` runs since the process started; without one, time counts from here.

    Raises UserError when configuration, store, mesh and run do not fit together, or gradients stay non-finite.
    """
    run, console, clock, steps = Path(run), console or screen(), clock or Clock(), experiment.train.steps
    with clock("devices"):
        speaks = jax.process_index() == 0
        mesh = make_mesh(experiment.mesh)
    check_fit(experiment, mesh)
    with contextlib.ExitStack() as stack:
        with clock("store"):
            store = open_data(experiment.data)
            lock = RunLock(run)
            stack.callback(lock.close)
            spec, tokenizer = start_or_resume(experiment, store, run, speaks, lock)
            samples = Samples(store, experiment.inputs, spec, tokenizer, experiment.labels, experiment.data.max_damaged)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(run, experiment.checkpoint, constant_until(experiment.optimizer, steps))
        stack.callback(checkpoints.close)
        first = checkpoints.latest() or 0
        if first >= steps:
            console.print(f"{run}: is at step {first} of {steps}; nothing is left to train.", soft_wrap=True)
            return Outcome(first, stopped=False)
        state, shardings = first_state(experiment, spec, mesh, checkpoints, clock)

        batches = Batches(experiment, samples, mesh, first, clock)
        stack.callback(batches.close)
        telemetry = Telemetry(run, first, steps, console, speaks, clock)
        stack.callback(telemetry.close)
        watchdog = Watchdog(run, experiment.train.stall_minutes, first, clock, warn)
        stack.callback(watchdog.close)
        stopping = stack.enter_context(StopSignal())

        batch = next(batches)
        graph, *_ = learner_shapes(experiment, spec)
        check_best(experiment, graph, spec, state, batch)
        optimizer = make_optimizer(experiment.optimizer, steps)
        with clock("compile"):
            step = jitted_step(graph, experiment, spec, optimizer, shardings, mesh).lower(state, batch).compile()
            flops = step_flops(graph, experiment, spec, state, batch)
            meet("step compiled")
        profiler = Profiler(run / PROFILE, experiment.train.profile)
        stack.callback(profiler.close)
        branch = constant_until(experiment.optimizer, steps)
        loop = Loop(
            config=experiment.train,
            saves=lambda number: number % experiment.checkpoint.every == 0 or number in (branch, steps),
            step=step,
            next_batch=batches.__next__,
            validate=Validation(experiment, graph, samples, spec, mesh, batches.rows),
            save=checkpoints.save,
            stopped=stopping.reached,
            telemetry=telemetry,
            watchdog=watchdog,
            profiler=profiler,
            meter=Meter(experiment.train.batch_size, flops, mesh),
            clock=clock,
        )
        last = loop.run(state, batch, first)
        with clock("save"):
            checkpoints.wait()
        telemetry.finish(last)
    if last < steps:
        console.print(
            f"Stopped at step {last} of {steps} and saved; the same command goes on from there.", soft_wrap=True
        )
    return Outcome(last, stopped=last < steps)


def first_state(
    experiment: Experiment, spec: InputSpec, mesh: Mesh, checkpoints: Checkpoints, clock: Clock
) -> tuple[TrainState, TrainState]:
    """The state that training starts from, restored or initial, in its shards; and the shardings of its leaves."""
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)

    def initial() -> TrainState:
        return initial_state(experiment, spec, optimizer)

    shapes = jax.eval_shape(initial)
    shardings = state_shardings(shapes, mesh)
    step = checkpoints.latest()
    if step is not None:
        with clock("restore"):
            return checkpoints.restore(step, shapes, shardings), shardings
    with clock("init"):
        return jax.jit(initial, out_shardings=shardings)(), shardings


def check_best(experiment: Experiment, graph: Any, spec: InputSpec, state: TrainState, batch: Batch) -> None:
    """Raises UserError when `checkpoint.best` is none of the metrics that validation gives; nothing is computed."""
    best = experiment.checkpoint.best
    validate = make_validation(graph, experiment, spec)

    def metrics(params: Any, buffers: Any, batch: Batch) -> Any:
        return nnx.merge(graph, params, buffers).metrics(validate(params, buffers, batch, np.int32(1)))

    names = sorted(f"validation/{name}" for name in jax.eval_shape(metrics, state.params, state.buffers, batch))
    if best is not None and best not in names:
        raise UserError(f"checkpoint.best: {best} is no metric of this run; there are {', '.join(names)}, or null")


class Batches:
    """The global batches of a run from a step on, in order and for ever."""

    def __init__(self, experiment: Experiment, samples: Samples, mesh: Mesh, first: int, clock: Clock):
        """`first`: steps that were taken before."""
        self._size, self._mesh, self._clock = experiment.train.batch_size, mesh, clock
        self.rows: np.ndarray = sharding.local_rows(self._size, mesh)
        """Those of the global batch that this process reads."""
        self._local = local_batches(
            training_rows(samples, "train", experiment.seed), self._size, self.rows, first,
            experiment.data.reader_threads, experiment.data.prefetch_batches, samples.packed,
            experiment.data.workers,
        )  # fmt: skip

    def __next__(self) -> Batch:
        with self._clock("data"):
            local = next(self._local)
        return sharding.global_batch(local, self.rows, self._size, self._mesh)

    def close(self) -> None:
        self._local.close()


@dataclass
class Loop:
    """Takes steps, and logs, validates and saves between them."""

    config: TrainConfig
    saves: Callable[[int], bool]
    """Whether a checkpoint is due after a step."""
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    """From state and batch to the next state and metrics, which may still be under way when it returns."""
    next_batch: Callable[[], Any]
    validate: Callable[[Any, Any], dict[str, float]]
    """From parameters and buffers to metrics."""
    save: Callable[[int, Any, dict[str, float]], None]
    """Of a step, its state and, if it was validated, its validation metrics."""
    stopped: Callable[[int], bool]
    """Whether the run is to end after this step."""
    telemetry: Telemetry
    watchdog: Watchdog
    profiler: Profiler
    meter: Meter
    clock: Clock

    def run(self, state: Any, batch: Any, first: int) -> int:
        """Takes the steps after `first`, of which `batch` is the next one's; returns the last one taken.

        Raises UserError when the gradient was not finite `config.max_skipped` times in a row.
        """
        self._under_way: deque[tuple[int, dict[str, Any]]] = deque()
        self.meter.start(first, self.clock)
        for number in range(first + 1, self.config.steps + 1):
            self.watchdog.begins(number)
            self.profiler.starts(number)
            with self.clock("train"):
                state, metrics = self.step(state, batch)
                if number == first + 1:
                    jax.block_until_ready(metrics)
            if number == first + 1:
                self.telemetry.first_step_ended()
            self._under_way.append((number, metrics))
            last = number == self.config.steps
            if not last:
                batch = self.next_batch()
            self._settle(AHEAD)
            if self.profiler.is_last(number):
                self._settle(0)
                self.profiler.close()
            stopped = self.stopped(number)
            measured = self._validate(number, state) if number % self.config.validate_every == 0 or last else {}
            if self.saves(number) or stopped:
                self._save(number, state, measured)
            if stopped:
                break
        return number

    def _settle(self, left: int) -> None:
        """Reads the metrics of steps under way until `left` remain; logs and guards them."""
        while len(self._under_way) > left:
            number, metrics = self._under_way.popleft()
            with self.clock("train"):
                metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.telemetry.advance(number)
            self.watchdog.ended(number)
            if metrics["skipped_in_a_row"] >= self.config.max_skipped:
                raise UserError(
                    f"train: the gradient was not finite in the last {self.config.max_skipped} steps (step {number}); "
                    "the checkpoints before are sound; lower optimizer.learning_rate or look at the data"
                )
            if number % self.config.log_every == 0 or number == self.config.steps:
                ended = max([number, *(later for later, its in self._under_way if is_ready(its))])
                self.telemetry.log(number, metrics | self.meter.read(ended, self.clock) | self.clock.shares())

    def _validate(self, number: int, state: Any) -> dict[str, float]:
        self._settle(0)
        with self.clock("validate"):
            metrics = self.validate(state.params if state.average is None else state.average, state.buffers)
        self.telemetry.log(number, metrics)
        self.watchdog.ended(number)
        return metrics

    def _save(self, number: int, state: Any, measured: dict[str, float]) -> None:
        self._settle(0)
        with self.clock("save"):
            self.save(number, state, measured)
        self.watchdog.ended(number)


def is_ready(metrics: dict[str, Any]) -> bool:
    """Whether the step that gives these metrics has ended."""
    return all(value.is_ready() for value in metrics.values())


def warn(line: str) -> None:
    """On stderr, where the lines of every process of a run can be seen."""
    print(f"mmfm: {line}", file=sys.stderr, flush=True)

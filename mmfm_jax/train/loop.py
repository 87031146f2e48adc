"""`mmfm train`: from a configuration and a store to a trained run, or on from where the run stopped."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.parallel.processes import meet
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.fit import check_fit
from mmfm_jax.train.flops import step_flops
from mmfm_jax.train.meter import Meter
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.start import start_or_resume
from mmfm_jax.train.state import initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import jitted_step
from mmfm_jax.train.stop import StopSignal
from mmfm_jax.train.telemetry import Telemetry
from mmfm_jax.train.validation import Validation
from mmfm_jax.train.watchdog import Watchdog

AHEAD = 2  # steps given to the device before the metrics of the first are read


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
    run, console, clock = Path(run), console or Console(), clock or Clock()
    with clock("devices"):
        speaks = jax.process_index() == 0
        mesh = make_mesh(experiment.mesh)
    config = experiment.train
    check_fit(experiment, mesh)
    with clock("store"):
        store = open_data(experiment.data)
        spec, tokenizer = start_or_resume(experiment, store, run, speaks)
        samples = Samples(store, experiment.inputs, spec, tokenizer, experiment.labels)
    optimizer = make_optimizer(experiment.optimizer, config.steps)
    graph, *_ = learner_shapes(experiment, spec)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    shardings = state_shardings(shapes, mesh)
    checkpoints = Checkpoints(run, experiment.checkpoint)
    first = checkpoints.latest()
    with clock("init" if first is None else "restore"), jax.set_mesh(mesh):
        if first is None:
            first = 0
            state = jax.jit(lambda: initial_state(experiment, spec, optimizer), out_shardings=shardings)()
        else:
            state = checkpoints.restore(first, shapes, shardings)
    if first >= config.steps:
        console.print(f"{run}: is at step {first} of {config.steps}; nothing is left to train.", soft_wrap=True)
        return Outcome(first, stopped=False)

    rows = sharding.local_rows(config.batch_size, mesh)
    data = local_batches(
        training_rows(samples, "train", experiment.seed), config.batch_size, rows, first,
        experiment.data.reader_threads, experiment.data.prefetch_batches, samples.packed,
    )  # fmt: skip

    def next_batch():
        with clock("data"):
            local = next(data)
        return sharding.global_batch(local, rows, config.batch_size, mesh)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.callback(data.close)
        stack.callback(checkpoints.close)
        telemetry = Telemetry(run, first, config.steps, console, speaks, clock)
        stack.callback(telemetry.close)
        watchdog = Watchdog(run, config.stall_minutes, first, clock, warn)
        stack.callback(watchdog.close)
        stopping = stack.enter_context(StopSignal())

        batch = next_batch()
        with clock("compile"):
            step = jitted_step(graph, experiment, spec, optimizer, shardings, mesh).lower(state, batch).compile()
            flops = step_flops(graph, experiment, spec, shapes, batch)
            meet("step compiled")
        validate = Validation(experiment, graph, samples, spec, mesh, rows)
        meter = Meter(config.batch_size, flops, mesh)
        in_flight: deque = deque()
        validation: dict[str, float] = {}

        def settle(left: int) -> None:
            """Reads the metrics of steps under way until `left` remain; logs and guards them."""
            while len(in_flight) > left:
                number, metrics = in_flight.popleft()
                with clock("train"):
                    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
                telemetry.advance(number)
                watchdog.ended(number)
                if metrics["skipped_in_a_row"] >= config.max_skipped:
                    raise UserError(
                        f"train: the gradient was not finite in the last {config.max_skipped} steps (step {number}); "
                        f"the checkpoints in {run} are sound; lower optimizer.learning_rate or look at the data"
                    )
                if number % config.log_every == 0 or number == config.steps:
                    telemetry.log(number, metrics | meter.read(number, clock) | clock.shares())

        meter.start(first, clock)
        for number in range(first + 1, config.steps + 1):
            watchdog.begins(number)
            with clock("train"):
                state, metrics = step(state, batch)
                if number == first + 1:
                    jax.block_until_ready(metrics)
            if number == first + 1:
                telemetry.first_step_ended()
            in_flight.append((number, metrics))
            if number < config.steps:
                batch = next_batch()
            settle(AHEAD)
            last, stopped = number == config.steps, stopping.reached(number)
            if number % config.validate_every == 0 or last:
                settle(0)
                with clock("validate"):
                    validation = validate(state.params if state.average is None else state.average, state.buffers)
                telemetry.log(number, validation)
                watchdog.ended(number)
            if number % experiment.checkpoint.every == 0 or last or stopped:
                settle(0)
                measured = number % config.validate_every == 0 or last
                with clock("save"):
                    checkpoints.save(number, state, validation if measured else {})
                watchdog.ended(number)
            if stopped:
                break
        with clock("save"):
            checkpoints.wait()
        telemetry.finish(number)
    if stopped and number < config.steps:
        console.print(
            f"Stopped at step {number} of {config.steps} and saved; the same command goes on from there.",
            soft_wrap=True,
        )
    return Outcome(number, stopped=number < config.steps)


def warn(line: str) -> None:
    """On stderr, where the lines of every process of a run can be seen."""
    print(f"mmfm: {line}", file=sys.stderr, flush=True)

"""`mmfm train`: from a configuration and a store to a trained run, or on from where the run stopped."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import evaluation_batches, local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.parallel.processes import meet
from mmfm_jax.train import folder
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.fit import check_fit
from mmfm_jax.train.flops import peak_flops, step_flops
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import jitted_step, make_validation
from mmfm_jax.train.telemetry import Telemetry
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
        samples = Samples(store, experiment.inputs, spec, tokenizer, experiment.data.max_damaged)
    optimizer = make_optimizer(experiment.optimizer, config.steps)
    graph, _ = learner_shapes(experiment, spec)
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
        experiment.data.workers,
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
            flops = step_flops(graph, spec, shapes.params, batch)
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
                    validation = validate(state.params if state.average is None else state.average)
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


def start_or_resume(experiment: Experiment, store: Studies, run: Path, writes: bool) -> tuple[InputSpec, Tokenizer]:
    """The specification and tokenizer of a run: those in its folder, or new ones written there by the first process."""
    for split in ("train", "validation"):
        store.rows(split)
    if folder.exists(run):
        held, spec, tokenizer = folder.read(run)
        folder.check_same(run, held, experiment)
        now = make_spec(
            experiment.inputs, store.schema, store.stats, tokenizer, store.windows(experiment.inputs.images)
        )
        if now != spec:
            raise UserError(
                f"{store.url}: is not the store that {run} was trained on (its shapes, vocabularies or "
                "statistics differ); give that store, or another --run to start anew"
            )
    elif run.exists() and any(run.iterdir()) and not _only_leftovers(run):
        raise UserError(f"{run}: holds files but no run; give another --run, or an empty folder")
    else:
        tokenizer = make_tokenizer(experiment, store)
        spec = make_spec(
            experiment.inputs, store.schema, store.stats, tokenizer, store.windows(experiment.inputs.images)
        )
        learner_shapes(experiment, spec)  # every task agrees with the inputs before anything is written
    meet("run folder read")
    if writes:
        folder.write(run, experiment, spec, tokenizer)
    meet("run folder written")
    return spec, tokenizer


def _only_leftovers(run: Path) -> bool:
    """Whether a start that was cut off wrote all there is."""
    ours = {folder.TOKENIZER, folder.INPUTS}
    return all(path.name in ours or path.name.endswith(".partial") for path in run.iterdir())


def make_tokenizer(experiment: Experiment, store: Studies) -> Tokenizer:
    """The given tokenizer, or one trained on the texts of the store's training patients."""
    if experiment.data.tokenizer:
        return Tokenizer.load(experiment.data.tokenizer)
    return Tokenizer.train(store.texts(store.rows("train")), experiment.data.vocabulary_size)


class Validation:
    """Mean of the tasks' metrics over the first batches of the validation patients; the same ones each time."""

    def __init__(self, experiment: Experiment, graph, samples: Samples, spec: InputSpec, mesh: Mesh, rows: np.ndarray):
        self._config, self._samples, self._mesh, self._rows = experiment.train, samples, mesh, rows
        self._studies = min(
            len(samples.store.rows("validation")), self._config.validate_batches * self._config.batch_size
        )
        self._validate = jax.jit(make_validation(graph, experiment, spec), out_shardings=sharding.replicated(mesh))
        self._compiled: Any = None

    def __call__(self, params) -> dict[str, float]:
        """By `validation/METRIC`."""
        size, sums = self._config.batch_size, {}
        batches = evaluation_batches(self._samples, "validation", size, self._rows, self._studies)
        for count, local in enumerate(batches, 1):
            given = (params, sharding.global_batch(local, self._rows, size, self._mesh), jnp.int32(count))
            if self._compiled is None:
                self._compiled = self._validate.lower(*given).compile()
                meet("validation compiled")
            for name, value in jax.device_get(self._compiled(*given)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {f"validation/{name}": value / count for name, value in sums.items()}


class Meter:
    """Speed between two readings, without what compiling, validating and saving took."""

    def __init__(self, batch_size: int, flops: float, mesh: Mesh):
        self._batch_size, self._flops = batch_size, flops
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = peak and peak * mesh.size

    def start(self, step: int, clock: Clock) -> None:
        self._step, self._time, self._seconds = step, time.perf_counter(), dict(clock.seconds)

    def read(self, step: int, clock: Clock) -> dict[str, float]:
        spent = {name: clock.seconds[name] - self._seconds[name] for name in clock.seconds}
        busy = time.perf_counter() - self._time - spent["compile"] - spent["validate"] - spent["save"]
        rate = (step - self._step) / busy
        self.start(step, clock)
        speed = {
            "samples_per_second": rate * self._batch_size,
            "data_wait": spent["data"] / busy,
            "model_tflops_per_second": rate * self._flops / 1e12,
        }
        return speed | ({"mfu": rate * self._flops / self._peak} if self._peak else {})


class StopSignal:
    """SIGTERM, as a question to ask after each step; all processes of a run get the same answer at the same step."""

    def __enter__(self) -> StopSignal:
        self._asked = False
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

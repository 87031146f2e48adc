"""The loop takes each step once, and validates, saves and stops at the steps it should; no model is needed for that."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mmfm_jax.config.training import CheckpointConfig, MeshConfig, TrainConfig
from mmfm_jax.errors import UserError
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.health import Health
from mmfm_jax.train.loop import Loop
from mmfm_jax.train.meter import Meter
from mmfm_jax.train.patience import Patience
from mmfm_jax.train.profile import Profiler

SECONDS = 0.02  # of a step


class Told:
    """Stands for telemetry and watchdog, and keeps what it is told."""

    def __init__(self):
        self.lines: list[tuple[int, dict]] = []
        self.advanced: list[int] = []

    def log(self, step: int, metrics: dict) -> None:
        self.lines.append((step, metrics))

    def advance(self, step: int) -> None:
        self.advanced.append(step)

    def first_step_ended(self) -> None:
        self.lines.append((0, {"first": 1.0}))

    def begins(self, step: int) -> None: ...
    def ended(self, step: int) -> None: ...


def make_loop(config: dict, save_every: int, bad: tuple[int, ...] = (), stop_at: int = 0) -> tuple[Any, Any]:
    """A loop whose state counts steps and whose validation loss is lowest at step 3, and a record of what it did."""
    record = SimpleNamespace(batches=iter(range(2, 10**6)), trained=[], validated=[], saved=[], told=Told(), heard=[])
    config = {"batch_size": 4, "log_every": 1, **config}
    in_a_row = [0]

    def step(state, batch):
        time.sleep(SECONDS)
        record.trained.append(batch)
        in_a_row[0] = in_a_row[0] + 1 if batch in bad else 0
        state = SimpleNamespace(params=state.params + 1, average=None, buffers=None)
        return state, {"loss": jnp.float32(batch), "skipped_in_a_row": jnp.int32(in_a_row[0])}

    def validate(params, buffers):
        time.sleep(4 * SECONDS)
        record.validated.append(params)
        return {"validation/loss": float(abs(params - 3))}

    train = TrainConfig.model_validate(config)
    loop = Loop(
        config=train,
        saves=lambda number: number % save_every == 0 or number == loop.config.steps,
        step=step,
        next_batch=lambda: next(record.batches),
        validate=validate,
        save=lambda number, state, metrics: record.saved.append((number, state.params, metrics)),
        stopped=lambda number: number == stop_at,
        patience=Patience(train, CheckpointConfig(), {}, 0),
        health=Health(["loss"], record.heard.append),
        telemetry=record.told,
        watchdog=record.told,
        profiler=Profiler(Path(), None),
        meter=Meter(4, 1.0, make_mesh(MeshConfig(), jax.devices()[:1]), ahead=0),
        clock=Clock(),
    )
    return loop, record


def start() -> Any:
    return SimpleNamespace(params=0, average=None, buffers=None)


def test_each_step_is_taken_once_validated_and_saved_when_it_should_be():
    loop, did = make_loop({"steps": 7, "validate_every": 3}, save_every=2)
    assert loop.run(start(), 1, 0) == 7
    assert did.trained == did.told.advanced == [1, 2, 3, 4, 5, 6, 7]
    assert did.validated == [3, 6, 7]
    assert did.saved == [(2, 2, {}), (4, 4, {}), (6, 6, {"validation/loss": 3.0}), (7, 7, {"validation/loss": 4.0})]
    assert [metrics["loss"] for _, metrics in did.told.lines if "loss" in metrics] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_goes_on_after_the_steps_it_has_and_stops_where_it_is_told_to():
    loop, did = make_loop({"steps": 9, "validate_every": 100}, save_every=100, stop_at=6)
    assert loop.run(SimpleNamespace(params=4, average=None, buffers=None), 5, 4) == 6
    assert len(did.trained) == 2 and did.saved == [(6, 6, {})] and not did.validated


def test_gradients_that_stay_non_finite_end_the_run_before_anything_is_saved_of_them():
    loop, did = make_loop({"steps": 9, "validate_every": 100, "max_skipped": 2}, save_every=3, bad=(4, 5))
    with pytest.raises(UserError, match=r"not finite in the last 2 steps \(step 5\)"):
        loop.run(start(), 1, 0)
    assert [number for number, *_ in did.saved] == [3]


def test_a_run_stops_and_saves_when_validation_has_not_become_better_for_as_long_as_it_may():
    loop, did = make_loop({"steps": 20, "validate_every": 1, "patience": 2}, save_every=100)
    assert loop.run(start(), 1, 0) == 5
    assert did.validated == [1, 2, 3, 4, 5] and did.saved == [(5, 5, {"validation/loss": 2.0})]


def test_a_signal_while_the_run_validates_is_heeded_right_after():
    loop, did = make_loop({"steps": 20, "validate_every": 4}, save_every=100)
    loop.stopped = lambda number: bool(did.validated)
    assert loop.run(start(), 1, 0) == 4 and [number for number, *_ in did.saved] == [4]


def test_no_step_seems_fast_because_the_metrics_of_several_are_read_at_once():
    """Before a validation those of three are."""
    loop, did = make_loop({"steps": 12, "validate_every": 3}, save_every=100)
    loop.run(start(), 1, 0)
    speeds = [line["samples_per_second"] for _, line in did.told.lines if "samples_per_second" in line]
    assert len(speeds) >= 2
    assert max(speeds) <= 4 / SECONDS  # batch size over the seconds that a step takes at least

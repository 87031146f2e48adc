"""Speeds of made-up runs whose clock is set by hand, beside what they are by construction."""

import time

import jax
import pytest

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.meter import Meter

BATCH, AHEAD = 8, 4


class Run:
    """Steps of `step` seconds on batches that take `read` seconds each, of which `AHEAD` are read ahead.

    Readers go on while the run pauses, as long as there is room.
    """

    def __init__(self, monkeypatch, step: float, read: float, ahead: int = AHEAD):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.step, self.read, self.ahead = step, read, ahead
        self.clock, self.ended = Clock(), 0
        self.held, self.since = float(ahead), 0.0  # batches that are read, and when readers began the next
        self.meter = Meter(BATCH, 2e12, make_mesh(MeshConfig(), jax.devices()[:1]), ahead)
        self.meter.start(0, self.clock)

    def _pass(self, activity: str, seconds: float) -> None:
        with self.clock(activity):
            self.now += seconds
            self.held = min(self.ahead, self.held + seconds / self.read)

    def take(self) -> dict[str, float]:
        """A step, and what the meter reads after it."""
        if self.held < 1:
            self._pass("data", (1 - self.held) * self.read)
        self.held -= 1
        self._pass("train", self.step)
        self.ended += 1
        return self.meter.read(self.ended, self.clock)

    def pause(self, seconds: float, activity: str = "validate") -> None:
        self._pass(activity, seconds)


def speeds(readings: list[dict[str, float]]) -> list[float]:
    return [reading["samples_per_second"] for reading in readings if reading]


@pytest.mark.parametrize("pause_s", [0.5, 7, 600])
@pytest.mark.parametrize("step, read", [(0.1, 1.6), (0.5, 1.0), (1.0, 0.1)])
def test_the_steps_after_a_pause_are_as_fast_as_those_before(monkeypatch, step, read, pause_s):
    """Where reading is the slower part, batches that a validation of minutes gave time to read are no speed."""
    run = Run(monkeypatch, step, read)
    told = [run.take() for _ in range(60)]
    run.pause(pause_s)
    after = [run.take() for _ in range(60)]
    true = BATCH / max(step, read)
    assert len(speeds(after)) == 15
    first, *rest = speeds(told + after)
    assert first == pytest.approx(true, rel=0.25) and rest == pytest.approx([true] * len(rest), rel=0.08)
    assert [reading["data_wait"] for reading in after if reading] == pytest.approx(
        [max(0, 1 - step / read)] * 15, abs=0.08
    )


def test_short_saves_between_all_readings_change_little(monkeypatch):
    run = Run(monkeypatch, 0.1, 0.4)
    found = []
    for number in range(1, 121):
        found.append(run.take())
        if number % 10 == 0:
            run.pause(0.3, "save")
    assert speeds(found)[1:] == pytest.approx([BATCH / 0.4] * (len(speeds(found)) - 1), rel=0.15)


def test_what_was_read_before_the_first_step_is_no_speed_and_too_few_steps_are_none(monkeypatch):
    run = Run(monkeypatch, 0.1, 1.6)
    found = [run.take() for _ in range(8)]
    assert not any(found[:7]) and found[7]["samples_per_second"] == pytest.approx(BATCH / 1.6, rel=0.1)
    assert not run.take()


def test_a_step_that_was_nearly_done_at_a_reading_does_not_count_for_all(monkeypatch):
    """Its end is seen a moment after the reading before it."""
    run = Run(monkeypatch, 1.0, 0.1, ahead=0)
    for _ in range(4):
        reading = run.take()
    run.now += 0.01
    assert reading and not run.meter.read(run.ended + 1, run.clock)


def test_flops_and_their_share_of_the_peak(monkeypatch):
    monkeypatch.setattr("mmfm_jax.train.meter.peak_flops", lambda device: 8e12)
    run = Run(monkeypatch, 0.5, 0.1)
    *_, reading = (run.take() for _ in range(8))
    assert reading["model_tflops_per_second"] == pytest.approx(4) and reading["mfu"] == pytest.approx(0.5)

"""Goodput of made-up runs, computed by hand."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from mmfm_jax.train import goodput
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.telemetry import Telemetry

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def line(number: int, after_s: float, **seconds: float) -> dict:
    """A line of metrics.jsonl written `after_s` seconds after noon."""
    at = (NOON + timedelta(seconds=after_s)).isoformat(timespec="milliseconds")
    return {"step": number, "time": at} | {f"seconds/{kind}": value for kind, value in seconds.items()}


# Starts at noon, saves at step 20, is killed after step 30 and started again three minutes later.
FIRST = [
    line(0, 20, init=20) | {"start": 1},
    line(10, 60, compile=25, data=5, step=10),
    line(20, 90, data=6, step=24),
    line(30, 120, save=2, step=28),
]
AGAIN = NOON + timedelta(seconds=300)


def test_steps_taken_again_are_lost_and_the_time_until_the_restart_is_down():
    assert goodput.between(FIRST, first=20, started=AGAIN) == {"lost": 30, "down": 180}
    assert goodput.between(FIRST, first=30, started=AGAIN) == {"down": 180}
    assert goodput.between([], first=0, started=AGAIN) == {}


def test_shares_of_a_run_that_was_killed_once():
    second = [
        line(20, 310, lost=30, down=180, init=4, restore=6) | {"start": 2},
        line(30, 340, compile=5, step=25),
        line(30, 341, save=1),
    ]
    kept = [record for record in FIRST if record["step"] <= 20] + second
    seconds = goodput.spent(kept)
    assert sum(seconds.values()) == 341  # the wall time from noon to the last line
    shares = goodput.as_metrics(seconds)
    by_hand = {"init": 24, "restore": 6, "compile": 30, "data": 11, "save": 1, "lost": 30, "down": 180}
    assert shares.pop("goodput") == pytest.approx(59 / 341)
    assert shares == pytest.approx({f"badput/{kind}": value / 341 for kind, value in by_hand.items()})
    assert goodput.told(seconds, starts=2).startswith("Goodput 17.3% of 6 min over 2 starts; down 52.8%, ")


def test_a_line_accounts_for_all_that_passed_since_the_line_before(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(started=96.0)  # four seconds of importing
    ledger = goodput.Ledger(clock)

    def spend(activity: str, seconds: float) -> None:
        with clock(activity):
            now[0] += seconds

    spend("store", 2)
    now[0] += 1
    assert ledger.take("init") == {"init": 7}
    spend("compile", 8)
    spend("data", 1)
    spend("train", 3)
    now[0] += 0.5
    assert ledger.take("step") == {"compile": 8, "data": 1, "step": 3.5}
    assert clock.start_up() == {
        "start/import": 4, "start/store": 2, "start/compile": 8, "start/data": 1, "start/train": 3, "start/other": 1.5,
        "start/total": 19.5,
    }  # fmt: skip


def test_a_resumed_log_still_adds_up_to_the_wall_time(tmp_path):
    began = datetime.now(UTC) - timedelta(seconds=100)
    old = [
        line(0, 0, init=5) | {"start": 1, "time": (began + timedelta(seconds=5)).isoformat()},
        line(4, 0, step=20) | {"time": (began + timedelta(seconds=25)).isoformat()},
        line(6, 0, step=15) | {"time": (began + timedelta(seconds=40)).isoformat()},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old) + '{"step": 7, "ti')
    telemetry = Telemetry(tmp_path, 4, 10, Console(quiet=True), True, Clock())
    telemetry.finish(10, "finished")
    telemetry.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in lines] == [0, 4, 4, 10, 10]
    seconds = goodput.spent(lines)
    assert seconds["lost"] == 15 and seconds["down"] == pytest.approx(60, abs=1)
    assert sum(seconds.values()) == pytest.approx((datetime.now(UTC) - began).total_seconds(), abs=1)
    assert (
        lines[2]["start"] == 2
        and lines[-1]["ended"] == "finished"
        and lines[-1]["goodput"] == pytest.approx(0.2, abs=0.01)
    )

"""What a run prints, on a console that is no terminal and on one that is."""

import contextlib
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from mmfm_jax.errors import UserError
from mmfm_jax.train import folder
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.lines import ending
from mmfm_jax.train.telemetry import Telemetry

SPEED = {"samples_per_second": 48.0, "data_wait": 0.1}
LOSSES = {"loss": 3.0, "pairs/loss": 2.0, "pairs/accuracy": 0.5, "masked/loss": 1.0, "masked/image/ct": 1.0}
VALIDATION = {f"validation/{name}": 2 * value for name, value in LOSSES.items()}


class Screen:
    """Telemetry of a run of 100 steps of a second each, and what it printed."""

    def __init__(self, run, monkeypatch, terminal: bool):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=200, color_system=None)
        self.telemetry = Telemetry(run, 0, 100, console, True, Clock())
        self.step = 0

    def steps(self, number: int, more: dict | None = None) -> None:
        for _ in range(number):
            self.now, self.step = self.now + 1, self.step + 1
            if self.step == 1:
                self.telemetry.first_step_ended()
            self.telemetry.advance(self.step)
            self.telemetry.log(self.step, LOSSES | SPEED | (more or {}))

    def lines(self) -> list[str]:
        return [line for line in self.file.getvalue().splitlines() if "loss" in line]


@pytest.fixture
def screen(tmp_path, monkeypatch):
    shown = Screen(tmp_path, monkeypatch, terminal=False)
    yield shown
    shown.telemetry.close()


def test_without_a_terminal_a_line_every_few_seconds_says_how_the_run_goes(screen):
    screen.steps(21)
    shown = "loss 3.000 (pairs 2.000, masked 1.000), 48 samples/s, data wait 10%"
    left = {1: "", 6: ", 94 s left", 11: ", 89 s left", 16: ", 84 s left", 21: ", 79 s left"}
    assert screen.lines() == [f"step {step} of 100: {shown}{seconds}" for step, seconds in left.items()]
    assert "First step after 1.0 s" in screen.file.getvalue()


def test_a_validation_stands_in_the_next_line_and_the_last_of_all_is_never_lost(screen):
    screen.steps(2)
    screen.telemetry.log(2, VALIDATION)
    screen.steps(5)
    screen.telemetry.log(7, VALIDATION)
    screen.telemetry.finish(7, "finished")
    validated = "loss 6.000 (pairs 4.000, masked 2.000)"
    first, second, last = screen.lines()
    assert "validation" not in first
    assert second.startswith("step 6 of 100: ") and second.endswith(f"; validation at step 2: {validated}")
    assert last.startswith("step 7 of 100: ") and last.endswith(f"; validation at step 7: {validated}")


def test_the_share_of_the_peak_is_told_where_it_is_known(screen):
    screen.steps(1, {"mfu": 0.4123})
    assert screen.lines()[0].endswith("data wait 10%, MFU 41.2%")


def test_with_a_terminal_there_is_a_bar_and_a_line_for_each_validation_alone(tmp_path, monkeypatch):
    screen = Screen(tmp_path, monkeypatch, terminal=True)
    screen.steps(9)
    screen.telemetry.log(9, VALIDATION)
    screen.telemetry.close()
    told = [line for line in screen.lines() if "ETA" not in line]
    assert [line.removeprefix("\x1b[2K") for line in told] == [
        "validation at step 9: loss 6.000 (pairs 4.000, masked 2.000)"
    ]
    assert any("9/100" in line for line in screen.lines())


def test_the_log_says_why_a_run_ended(screen, tmp_path):
    screen.steps(1)
    screen.telemetry.finish(1, "SIGINT")
    assert '"ended": "SIGINT"' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_disk_that_is_full_while_the_run_logs_is_one_sentence(screen, tmp_path):
    with contextlib.suppress(OSError), open("/dev/full", "a") as full:  # what is left is written again as it closes
        screen.telemetry._file = full
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"), folder.writing(tmp_path):
            screen.steps(1)


@pytest.mark.parametrize(
    "cause, expected",
    [
        ("finished", ["Finished at step 9. Best loss: 2 at step 5.", "Next: mmfm evaluate 'my run'"]),
        ("SIGTERM", ["Stopped at step 9 of 10 and saved, by SIGTERM; the same command goes on from there."]),
        (
            "patience",
            ["Stopped at step 9 of 10 and saved, as so. Best loss: 2 at step 5.", "Next: mmfm evaluate 'my run'"],
        ),
    ],
)
def test_at_the_end_stands_why_it_is_one_the_best_step_and_the_next_command(cause, expected):
    assert ending(9, 10, cause, "so", "Best loss: 2 at step 5.", Path("my run")) == expected

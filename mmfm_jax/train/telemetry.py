"""What a run tells while it goes: a progress bar or lines, TensorBoard, `metrics.jsonl`, and where its time went."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from tensorboardX import SummaryWriter

from mmfm_jax.files import open_own, replace
from mmfm_jax.screen import text_column
from mmfm_jax.train import goodput
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.lines import Lines, told

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Telemetry:
    """Writes only on the first process of a run; the others stay silent."""

    def __init__(self, run: Path, first_step: int, steps: int, console: Console, speaks: bool, clock: Clock):
        self._speaks, self._first, self._console, self._clock = speaks, first_step, console, clock
        self._last, self._began = steps, clock.elapsed()
        if not speaks:
            return
        self._ledger = goodput.Ledger(clock)
        self._open_lines(run / METRICS)
        self._board = SummaryWriter(str(run / TENSORBOARD), purge_step=first_step)
        columns = (
            text_column("step"), MofNCompleteColumn(), BarColumn(), text_column("{task.fields[told]}"),
            text_column("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        self._lines = Lines(console, steps)
        self._bar = Progress(*columns, console=console, disable=not self._lines.bar)
        self._bar.start()
        self._steps = self._bar.add_task("", total=steps, completed=first_step, told="compiling")

    def advance(self, step: int) -> None:
        if self._speaks:
            self._bar.update(self._steps, completed=step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self._speaks:
            return
        self._write(step, metrics, self._ledger.take("step"))
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if "validation/loss" in metrics:
            self._lines.validated(step, metrics)
        elif "loss" in metrics:
            self._bar.update(self._steps, told=told(metrics, by_task=False))
            self._lines.trained(step, metrics, self._seconds_left(step))

    def first_step_ended(self) -> None:
        """Says where the time went until the first step had ended."""
        self._began = self._clock.elapsed()
        if not self._speaks:
            return
        parts = self._clock.start_up()
        self._write(self._first, parts, {})
        spent = ", ".join(f"{name.removeprefix('start/')} {seconds:.1f}" for name, seconds in parts.items())
        spent = spent.replace("data ", "first batch ").replace("train ", "first step ").rpartition(", total")[0]
        self._console.print(f"First step after {parts['start/total']:.1f} s: {spent}.", soft_wrap=True)

    def finish(self, step: int, cause: str) -> None:
        """Logs why the run ends here and the goodput so far, over all its starts, and prints it."""
        if not self._speaks:
            return
        self._lines.finish()
        self.log(step, self._clock.shares())
        self._write(step, goodput.as_metrics(self._spent), {}, ended=cause)
        self._console.print(goodput.told(self._spent, self._starts), soft_wrap=True)

    def close(self) -> None:
        if self._speaks:
            self._bar.stop()
            try:
                self._file.close()
            finally:
                self._board.close()

    def _seconds_left(self, step: int) -> float | None:
        """At the pace since the first step, validations and saves included; None at that one."""
        taken = step - self._first - 1
        return (self._clock.elapsed() - self._began) / taken * (self._last - step) if taken > 0 else None

    def _write(self, step: int, metrics: dict[str, float], seconds: dict[str, float], **more: str) -> None:
        self._file.write(_line(step, metrics, seconds, **more))
        self._file.flush()
        self._spent = goodput.total(self._spent, seconds)

    def _open_lines(self, path: Path) -> None:
        """`metrics.jsonl` for appending, less what was logged of steps that are about to be taken again.

        The line that opens a start holds its number, and the time that passed until here since the line before.
        """
        texts, lines = [], []
        for text in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut short
                lines.append(json.loads(text))
                texts.append(text + "\n")
        self._starts = 1 + max((line.get("start", 0) for line in lines), default=0)
        started = datetime.now(UTC) - timedelta(seconds=self._clock.elapsed())
        seconds = goodput.between(lines, self._first, started) | self._ledger.take("init")
        kept = [text for text, line in zip(texts, lines) if line["step"] <= self._first]
        self._spent = goodput.spent(line for line in lines if line["step"] <= self._first)
        replace(path, "".join(kept) + _line(self._first, {"start": self._starts}, seconds))
        self._spent = goodput.total(self._spent, seconds)
        self._file = os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def _line(step: int, metrics: dict[str, float], seconds: dict[str, float], **more: str) -> str:
    finite = {name: value if _finite(value) else None for name, value in metrics.items()}
    passed = {goodput.PREFIX + kind: round(value, 4) for kind, value in seconds.items()}
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"step": step, "time": now} | more | finite | passed) + "\n"


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")

"""What a run tells while it goes: a progress bar, TensorBoard, `metrics.jsonl`, and where its time went."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from mmfm_jax.train import folder

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
ACTIVITIES = ("compile", "data", "train", "validate", "save")


class Clock:
    """Seconds of a run by activity; what no activity claims is `other`."""

    def __init__(self):
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Share of the time since the start, as `time/ACTIVITY`; they sum to 1."""
        total = time.perf_counter() - self.started
        shares = {f"time/{activity}": seconds / total for activity, seconds in self.seconds.items()}
        return shares | {"time/other": max(0.0, 1 - sum(shares.values()))}


class Telemetry:
    """Writes only on the first process of a run; the others stay silent."""

    def __init__(self, run: Path, first_step: int, steps: int, console: Console, speaks: bool):
        self._speaks = speaks
        if not speaks:
            return
        self._lines = _open_lines(run / METRICS, first_step)
        self._board = SummaryWriter(str(run / TENSORBOARD), purge_step=first_step)
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[told]}"),
            TextColumn("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console)
        self._bar.start()
        self._steps = self._bar.add_task("", total=steps, completed=first_step, told="compiling")

    def advance(self, step: int) -> None:
        if self._speaks:
            self._bar.update(self._steps, completed=step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self._speaks:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        finite = {name: value if _finite(value) else None for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, "time": now} | finite) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if "samples_per_second" in metrics:
            told = f"loss {metrics['loss']:.3f}  {metrics['samples_per_second']:.0f} samples/s"
            told += f"  data wait {100 * metrics['data_wait']:.0f}%"
            self._bar.update(self._steps, told=told)

    def close(self) -> None:
        if self._speaks:
            self._bar.stop()
            self._lines.close()
            self._board.close()


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _open_lines(path: Path, first_step: int):
    """`metrics.jsonl` for appending, less what was logged of steps that are about to be taken again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut short
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
        folder.replace(path, "".join(kept))
    return path.open("a")

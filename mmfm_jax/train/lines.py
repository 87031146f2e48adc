"""What is printed of a run that goes on: without a terminal all that is logged, with one the validations."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console

from mmfm_jax.train.goodput import duration

EVERY_S = 5.0  # between two lines, at least


class Lines:
    """At most one line in `EVERY_S`; what came in between gives way to what is newer, and the newest is never lost."""

    def __init__(self, console: Console, steps: int):
        self._console, self._steps = console, steps
        self.bar = console.is_terminal or console.is_jupyter
        """Whether a progress bar shows the steps, so that no line has to."""
        self._trained = self._validated = ""
        self._last = -EVERY_S

    def trained(self, step: int, metrics: dict[str, float], seconds_left: float | None) -> None:
        if not self.bar:
            left = "" if seconds_left is None else f", {duration(seconds_left)} left"
            self._trained = f"step {step} of {self._steps}: {told(metrics)}{left}"
            self._print()

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        plain = {name.removeprefix("validation/"): value for name, value in metrics.items()}
        self._validated = f"validation at step {step}: {told(plain)}"
        self._print()

    def finish(self) -> None:
        """Prints what is still to be said."""
        self._print(now=True)

    def _print(self, now: bool = False) -> None:
        held = [line for line in (self._trained, self._validated) if line]
        if not held or not (now or time.perf_counter() - self._last >= EVERY_S):
            return
        self._last = time.perf_counter()
        self._trained = self._validated = ""
        self._console.print("; ".join(held), soft_wrap=True, highlight=False)


def told(metrics: dict[str, float], by_task: bool = True) -> str:
    """The loss, that of each task, and the speed where it is known."""
    losses = {name.removesuffix("/loss"): value for name, value in metrics.items() if by_task and is_loss_of_task(name)}
    tasks = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    parts = [f"loss {metrics['loss']:.3f}" + (f" ({tasks})" if tasks else "")]
    if "samples_per_second" in metrics:
        parts.append(f"{metrics['samples_per_second']:.3g} samples/s")
        parts.append(f"data wait {100 * metrics['data_wait']:.0f}%")
    if "mfu" in metrics:
        parts.append(f"MFU {100 * metrics['mfu']:.1f}%")
    return ", ".join(parts)


def is_loss_of_task(name: str) -> bool:
    """Of the names of metrics, `TASK/loss`."""
    return name.count("/") == 1 and name.endswith("/loss")


def ending(last: int, steps: int, cause: str, patience: str, best: str, run: Path) -> list[str]:
    """What is printed at the end: why it is one, what is best, and what to do next."""
    if cause == "finished":
        why = f"Finished at step {last}."
    elif cause == "patience":
        why = f"Stopped at step {last} of {steps} and saved, as {patience}."
    else:
        return [f"Stopped at step {last} of {steps} and saved, by {cause}; the same command goes on from there."]
    return [f"{why} {best}", f"Next: mmfm evaluate {shlex.quote(str(run))}"]

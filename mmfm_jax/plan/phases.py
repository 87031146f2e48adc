"""What a plan is doing and for how long: one line that moves on a terminal, elsewhere a line for each phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from mmfm_jax.screen import text_column

Phase = Callable[[str], None]
"""Told the name of each phase as it begins."""


def unsaid(name: str) -> None:
    """For callers whom nobody watches."""


class Phases:
    """A `Phase` that says so on the console; at the end, how long each took."""

    def __init__(self, console: Console):
        self._console = console
        columns = (SpinnerColumn(), text_column("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._begun: list[tuple[str, float]] = []

    def __enter__(self) -> Phases:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __call__(self, name: str) -> None:
        self._begun.append((name, time.perf_counter()))
        if not self._console.is_terminal:
            self._console.print(f"plan: {name} ...", soft_wrap=True, highlight=False)
            return
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(f"{name} ...")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        if kind is None and self._begun:
            ends = [*(began for _, began in self._begun[1:]), time.perf_counter()]
            took = ", ".join(f"{name} {end - began:.1f}" for (name, began), end in zip(self._begun, ends))
            self._console.print(f"plan: seconds of each: {took}", soft_wrap=True, highlight=False)

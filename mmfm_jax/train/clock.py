"""Where the time of a process goes, from its start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

START = ("import", "devices", "store", "init", "restore")
ACTIVITIES = (*START, "compile", "data", "train", "validate", "save")


class Clock:
    """Seconds of a process by activity; what no activity claims is `other`."""

    def __init__(self, started: float | None = None, before: Mapping[str, Callable[[], None]] | None = None):
        """`started`: when the process did, by `time.perf_counter`; what passed until now was spent on importing.
        `before`: what is called when an activity begins."""
        self._before = before or {}
        now = time.perf_counter()
        self._started = now if started is None else started
        self.seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self.seconds["import"] = now - self._started
        self.activity = "other"
        """What is under way; read by the watchdog's thread."""

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        self._before.get(activity, lambda: None)()
        start, self.activity = time.perf_counter(), activity
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start
            self.activity = "other"

    def elapsed(self) -> float:
        """Seconds since the process started."""
        return time.perf_counter() - self._started

    def shares(self) -> dict[str, float]:
        """Share of the time since the start, as `time/ACTIVITY`; they sum to 1."""
        total = self.elapsed()
        shares = {f"time/{activity}": seconds / total for activity, seconds in self.seconds.items()}
        return shares | {"time/other": max(0.0, 1 - sum(shares.values()))}

    def start_up(self) -> dict[str, float]:
        """Seconds until the first step had ended, as `start/ACTIVITY`; call it at that moment."""
        total = self.elapsed()
        parts = {f"start/{activity}": seconds for activity, seconds in self.seconds.items() if seconds}
        return parts | {"start/other": max(0.0, total - sum(parts.values())), "start/total": total}

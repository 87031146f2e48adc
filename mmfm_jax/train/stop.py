"""A run that is told to stop saves first."""

from __future__ import annotations

import signal

import jax
from jax.experimental import multihost_utils


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

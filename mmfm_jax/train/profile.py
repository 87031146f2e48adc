"""A trace of some steps of a run, for XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from mmfm_jax.config.training import ProfileConfig


class Profiler:
    """Traces the steps it is configured for on this process, into a folder that all processes share."""

    def __init__(self, place: Path, config: ProfileConfig | None):
        self._place, self._config, self._tracing = place, config, False

    def starts(self, step: int) -> None:
        """To be called before each step."""
        if self._config is not None and step == self._config.start:
            jax.profiler.start_trace(str(self._place))
            self._tracing = True

    def is_last(self, step: int) -> bool:
        """Whether the trace is to end with this step, once the device has taken it."""
        return self._config is not None and self._tracing and step == self._config.start + self._config.steps - 1

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False

"""Intervals over patients, the same resamples for every statistic of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mmfm_jax.metrics.statistics import Measure, Resamples, Statistic

HELD = 4  # sets of studies whose resamples are kept at a time


@dataclass(frozen=True)
class Bootstrap:
    resamples: int
    seed: int
    _drawn: list[tuple[np.ndarray, Resamples]] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, statistic: Statistic, patients: np.ndarray) -> Measure:
        """The statistic with its 95% interval over `patients`, those of each study."""
        return self._of(patients).measure(statistic)

    def _of(self, patients: np.ndarray) -> Resamples:
        """Those of the same array are drawn once."""
        for held, resamples in self._drawn:
            if held is patients:
                return resamples
        drawn = Resamples(patients, self.resamples, self.seed)
        self._drawn.append((patients, drawn))
        del self._drawn[:-HELD]
        return drawn
